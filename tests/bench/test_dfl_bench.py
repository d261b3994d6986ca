"""The benchmark of the training ops runs through, so that it is there when a figure is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("dfl.py")


def test_quick_run() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT), "--quick"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "torch / ours, boxes, GIoU and DFL of a training step" in result.stdout.partition("## Goals")[2]
