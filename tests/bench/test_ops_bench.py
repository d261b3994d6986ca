"""The benchmark of the ops runs through, so that it is there when a figure is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ops.py")


def test_quick_run(shared: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--shared", str(shared)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    goals = result.stdout.partition("## Goals")[2]
    assert "NumPy + cv2 / ours" in goals
    assert "ours / streaming read, maps from memory" in goals


def test_missing_logits_get_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--shared", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        == f"{tmp_path}/bench/gen_raw.py is not there: give the folder that holds bench/gen_raw.py with --shared"
    )
