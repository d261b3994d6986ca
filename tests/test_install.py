"""Wheels and editable installs work without torch, and without a CUDA compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pybind11
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

CHECK = """
import importlib.metadata, importlib.util
assert importlib.util.find_spec("torch") is None
from yolonas.ops import numpy as npops
import numpy as np
print(npops.nms(np.array([[0, 0, 2, 2], [0, 0, 2, 2.1]], np.float32), np.array([0.5, 0.6], np.float32), 0.7).tolist())
import yolonas.ops
try:
    yolonas.ops.decode_nms
except ModuleNotFoundError as error:
    print(error)
print(importlib.metadata.requires("yolonas")[0])
"""


def run(*command: str | Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.timeout(300)
def test_wheel_and_editable_install_without_torch_and_without_cuda(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", wheels, REPOSITORY, YOLONAS_CUDA="OFF")
    (wheel,) = wheels.glob("yolonas-*.whl")
    names = ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".a", ".h", ".cmake"))]
    assert {"yolonas/training/report.css", "yolonas/shipped/yolo_nas_n_bccd.safetensors"} <= set(names)
    page = {path.name for path in (REPOSITORY / "labelstudio_backend" / "dashboard").iterdir()}
    assert page == {name.rpartition("/")[2] for name in names if name.startswith("labelstudio_backend/dashboard/")}
    run(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel)
    lines = run(python, "-c", CHECK).splitlines()
    assert lines[0] == "[1]"
    assert lines[1].startswith("yolonas.ops.decode_nms needs torch 2.11 or newer, which is not installed")
    assert lines[2].startswith("numpy")
    help_text = subprocess.run([tmp_path / "env" / "bin" / "yolonas", "--help"], capture_output=True, text=True)
    assert help_text.returncode == 1
    assert "Traceback" not in help_text.stderr
    assert "pip install 'yolonas[detector]'" in help_text.stderr

    run(python, "-m", "pip", "install", "-q", "--no-deps", "-e", REPOSITORY, YOLONAS_CUDA="OFF")
    assert run(python, "-c", CHECK).splitlines() == lines
    location = run(python, "-c", "import yolonas; print(yolonas.__file__)").strip()
    assert Path(location) == REPOSITORY / "python" / "yolonas" / "__init__.py"


@pytest.mark.parametrize("wish", ["ON", "AUTO"])
def test_without_nvcc_the_build_says_so(tmp_path: Path, wish: str) -> None:
    path = os.environ["PATH"].split(os.pathsep)
    hidden = [part for part in [*path, "/usr/local/bin", "/usr/local/cuda/bin"] if (Path(part) / "nvcc").exists()]
    environment = {**os.environ, "PATH": os.pathsep.join(part for part in path if part not in hidden)}
    environment.pop("CUDA_HOME", None)
    result = subprocess.run(
        [
            *("cmake", "-S", REPOSITORY, "-B", tmp_path, f"-DYOLONAS_CUDA={wish}", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_IGNORE_PATH={';'.join(hidden)}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
        ],
        capture_output=True,
        text=True,
        env=environment,
    )
    if wish == "ON":
        assert result.returncode != 0
        assert "YOLONAS_CUDA=ON, but no nvcc was found" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert "no nvcc found, building the CPU kernels only" in result.stdout
