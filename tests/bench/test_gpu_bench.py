"""The GPU benchmark's script, as far as a machine without a GPU can run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent
SCRIPT = BENCH / "gpu.py"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)


def test_quick_run_on_the_cpu(shared: Path) -> None:
    result = run(str(SCRIPT), "--device", "cpu", "--quick", "--cases", "40", "--shared", str(shared))
    assert result.returncode == 0, result.stderr
    assert "40 random cases" in result.stdout
    assert "all have the bits of the CPU" in result.stdout
    goals = result.stdout.partition("## Goals")[2]
    assert "reference pipeline / ours, eager" in goals
    assert "batch 1: in a graph | not measured" in goals


def test_missing_logits_get_a_sentence(tmp_path: Path) -> None:
    result = run(str(SCRIPT), "--device", "cpu", "--shared", str(tmp_path))
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == f"{tmp_path}/bench/gen_raw.py is not there: give the folder that holds bench/gen_raw.py with --shared"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_device_it_says_so() -> None:
    result = run(str(SCRIPT))
    assert result.returncode == 1
    assert result.stderr.strip() == "torch sees no CUDA device; --device cpu tries the script without one"


WRONG_ON_THE_DEVICE = """
import gpu_cases, measuring
right = gpu_cases.ops.nms
calls = []
def wrong(*arguments):
    calls.append(arguments)
    kept = right(*arguments)
    return kept if len(calls) % 2 else kept.flip(0)  # a case runs on the CPU first
gpu_cases.ops.nms = wrong
assert not gpu_cases.compare(measuring.Report("", "", ""), 60, "cpu")
"""


def test_cases_find_a_wrong_kernel() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WRONG_ON_THE_DEVICE], capture_output=True, text=True, timeout=300, cwd=BENCH
    )
    assert result.returncode == 0, result.stderr
    assert "differ from the CPU**: ['nms " in result.stdout
