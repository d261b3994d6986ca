"""The benchmark of serving runs through, so that it is there when a figure is wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("serving.py")


@pytest.mark.slow  # a minute: clients wait for batch actions to end
def test_quick_run(shared: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--seconds", "0.5", "--weights", "yolo_nas_n_bccd", "--shared", str(shared)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert "had 250 of 250 tasks answered" in result.stdout
