"""The benchmark of a training step runs through, so that it is there when a figure is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("step.py")


@pytest.mark.slow  # installs modern-yolonas, and takes a minute
def test_quick_run(shared: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--shared", str(shared)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    goals = result.stdout.partition("## Goals")[2]
    assert "64 px, batch 2, modern-yolonas, float32 / ours" in goals
    assert "loader / step, 64 px, 2 workers" in goals


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cuda"], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 1
    assert result.stderr.strip() == "there is no CUDA device: leave --device out"
