"""Builds, checks and measures yolonas.ops on a CUDA device in one call, and prints every figure beside its goal.

python tests/bench/gpu.py [--shared ../shared] [--write]        (under 10 minutes on an H100 with 16 cores)

The steps, all by default: `build` installs this checkout into the Python that runs the script (no network needed),
`tests` runs `pytest -m gpu`, `cases` compares random calls with the CPU's bits, `sanitizer` runs some of them under
compute-sanitizer, `figures` measures. A failed check makes the exit status 1, a missed goal does not. `--device cpu`
runs cases and figures without a GPU, to see that the script works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from measuring import REPOSITORY, Report

STEPS = ("build", "tests", "cases", "sanitizer", "figures")


def build(architectures: str) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", str(REPOSITORY)]
    parallel = str(os.cpu_count())
    settings = {"YOLONAS_CUDA": "ON", "CUDAARCHS": architectures, "CMAKE_BUILD_PARALLEL_LEVEL": parallel}
    subprocess.run(install, env=os.environ | settings, check=True)


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1].strip("= ")


def gpu_tests(report: Report) -> bool:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/ops"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    passed = run.returncode == 0 and re.search(r"\d+ passed", run.stdout) is not None
    if not passed:
        print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
    report.text(f"\n`pytest -m gpu tests/ops`: {last_line(run.stdout)}")
    return passed


def sanitize(report: Report) -> bool:
    """compute-sanitizer's memcheck and racecheck over random cases, in a process of its own."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        report.text("\ncompute-sanitizer: not found, so memcheck and racecheck were **not run**")
        return True
    clean = True
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that memcheck sees where a tensor ends
    for kind in ("memcheck", "racecheck"):
        cases = [sys.executable, __file__, "--steps", "cases", "--cases", "60"]
        command = [tool, "--tool", kind, "--error-exitcode", "7", *cases]
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
        except subprocess.TimeoutExpired:
            report.text(f"\ncompute-sanitizer {kind}: **not finished** within 180 s")
            clean = False
            continue
        summary = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY.*)", run.stdout + run.stderr)
        if run.returncode != 0:
            print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
            clean = False
        report.text(f"\ncompute-sanitizer {kind}: {summary[-1] if summary else f'exit status {run.returncode}'}")
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared", help="holds bench/gen_raw.py")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--architectures", help="for the build, as in CUDAARCHS; default: the device's own")
    parser.add_argument("--commit", help="to name in the report where the checkout has no .git")
    parser.add_argument("--cases", type=int, default=10_000, help="random calls to compare")
    parser.add_argument("--quick", action="store_true", help="a few figures and rounds, to see that all of it works")
    parser.add_argument("--write", action="store_true", help="write tests/bench/results/gpu_<device>.md")
    arguments = parser.parse_args()
    steps = set(arguments.steps)
    name = "a CPU, not a GPU"
    if arguments.device == "cpu":
        steps -= {"build", "tests", "sanitizer"}
    elif not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; --device cpu tries the script without one")
    else:
        name = torch.cuda.get_device_name()
    generator_file = arguments.shared / "bench" / "gen_raw.py"
    if "figures" in steps and not generator_file.is_file():
        sys.exit(f"{generator_file} is not there: give the folder that holds bench/gen_raw.py with --shared")
    if "build" in steps:
        build(arguments.architectures or "{}{}-real".format(*torch.cuda.get_device_capability()))
    import gpu_cases  # of the package that was just built
    import gpu_figures

    versions = f"CUDA {torch.version.cuda}, {gpu_figures.TORCHVISION}"
    command = " ".join(["python tests/bench/gpu.py", *sys.argv[1:]])
    report = Report(f"yolonas.ops on {name}", versions, command, arguments.commit)
    good = gpu_tests(report) if "tests" in steps else True
    if "cases" in steps:
        good &= gpu_cases.compare(report, arguments.cases, arguments.device)
    if "sanitizer" in steps:
        good &= sanitize(report)
    if "figures" in steps:
        gpu_figures.measure(report, arguments.shared, arguments.device, arguments.quick)
    report.finish()
    if not good:
        report.text("\n**A check failed.**")
    if arguments.write:
        report.write("gpu", name)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
