"""The C++ library as other projects use it: installed and found by CMake, or as a subdirectory of their build."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = REPOSITORY / "tests" / "examples" / "cpp"
DETECTIONS = """\
class 1  score 0.881  box 40.0 40.0 136.0 136.0
class 2  score 0.818  box 168.0 136.0 296.0 264.0
"""
KEPT = "kept 1 2 3\n"


def run(*command: str | Path) -> str:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source: Path, folder: Path, *definitions: str) -> Path:
    run("cmake", "-S", source, "-B", folder, "-G", "Ninja", *(f"-D{definition}" for definition in definitions))
    run("cmake", "--build", folder)
    return folder


def nvcc() -> bool:
    return shutil.which("nvcc") is not None or any(
        (Path(folder) / "bin" / "nvcc").exists() for folder in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    )


@pytest.mark.parametrize("cuda", ["OFF", pytest.param("ON", marks=pytest.mark.skipif(not nvcc(), reason="needs nvcc"))])
def test_example_builds_against_the_installed_package(tmp_path: Path, cuda: str) -> None:
    core = build(REPOSITORY, tmp_path / "core", f"YOLONAS_CUDA={cuda}", "CMAKE_CUDA_ARCHITECTURES=90")
    prefix = tmp_path / "prefix"
    run("cmake", "--install", core, "--prefix", prefix)
    shutil.rmtree(core)  # the package must not lean on the build
    installed = sorted(str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file())
    assert [path for path in installed if "cmake" not in path] == ["include/yolonas/ops.h", "lib/libyolonas_core.a"]

    version = (prefix / "lib" / "cmake" / "yolonas" / "yolonasConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{importlib.metadata.version("yolonas")}")' in version

    example = build(EXAMPLE, tmp_path / "example", f"CMAKE_PREFIX_PATH={prefix}")
    lines = run(example / "detections")
    assert lines.startswith(DETECTIONS)
    assert lines.endswith(KEPT)
    assert ("bytes of workspace" in lines) == (cuda == "ON")
