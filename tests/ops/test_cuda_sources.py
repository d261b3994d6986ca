"""The CUDA kernels where there is no GPU: their source runs on the CPU, their binary is looked into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from machine import missing
from yolonas import _core

REPOSITORY = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).with_name("cuda_emulation")

built_with_cuda = pytest.mark.skipif(not _core.WITH_CUDA, reason="the installed yolonas was built without nvcc")


def has_device() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that compares the kernels' source, run on the CPU thread by thread, with the CPU code."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or not sys.platform.startswith("linux"):
        missing("emulating the CUDA kernels needs a C++ compiler and Linux")
    core = REPOSITORY / "csrc" / "core"
    program = tmp_path_factory.mktemp("cuda_emulation") / "kernels_match_cpu"
    options = [
        "-std=c++17",
        "-O1",
        "-U_FORTIFY_SOURCE",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    sources = [EMULATION / "kernels_match_cpu.cpp", *sorted((core / "cpu").glob("*.cpp"))]
    kernels = sorted((core / "cuda").glob("*.cu"))
    command = [compiler, *options, f"-I{EMULATION}", f"-I{core}", "-pthread", *sources, "-x", "c++", *kernels]
    subprocess.run([*map(str, command), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("seed", [1, 2])
def test_kernels_give_the_bits_of_the_cpu(emulated: Path, seed: int) -> None:
    run = subprocess.run([emulated, str(seed)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert run.stdout.endswith("cases agree\n")


@built_with_cuda
def test_binary_runs_on_turing_to_hopper_and_later() -> None:
    if "CUDAARCHS" in os.environ:
        pytest.skip(f"CUDAARCHS={os.environ['CUDAARCHS']} chooses other architectures than the default")
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "cuobjdump"  # nvidia-cuda-cuobjdump
    cuobjdump = shutil.which("cuobjdump") or shutil.which(wheel)
    if cuobjdump is None:
        missing("needs cuobjdump: of a CUDA toolkit on PATH, or `pip install nvidia-cuda-cuobjdump`")

    def listed(kind: str) -> list[str]:
        output = subprocess.run(
            [cuobjdump, f"--list-{kind}", _core.__file__], check=True, capture_output=True, text=True
        )
        return re.findall(r"\.(sm_\d+)\.", output.stdout)

    sources = len(list((REPOSITORY / "csrc" / "core" / "cuda").glob("*.cu")))
    assert sorted(listed("elf")) == sorted(["sm_75", "sm_80", "sm_86", "sm_89", "sm_90"] * sources)
    assert listed("ptx") == ["sm_90"] * sources


@built_with_cuda
@pytest.mark.skipif(has_device(), reason="needs a machine without a CUDA device")
def test_without_a_device_the_error_names_op_and_cause() -> None:
    with pytest.raises(RuntimeError, match=r"^dfl_decode: .*(CUDA|driver|device)"):
        _core.dfl_decode_cuda([(0, 1, 1, 4, 1, 1, 1)], [8.0], 0, 1, 1, 0, 0, 0)
