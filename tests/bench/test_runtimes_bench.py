"""The scripts that time the Detector beside the peer, as far as any machine can run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import peer

BENCH = Path(__file__).parent


@pytest.mark.skipif(not peer.FOLDER.exists(), reason="needs modern-yolonas, which a benchmark installs")
def test_the_gpu_script_runs_on_a_cpu(shared: Path) -> None:
    options = ["--device", "cpu", "--size", "320", "--batches", "1", "2", "--rounds", "2", "--shared"]
    command = [sys.executable, str(BENCH / "runtimes_gpu.py"), *options, str(shared)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:5] for line in result.stdout.splitlines() if line.startswith(("| modern", "| fp32"))]
    assert len(rows) == 5  # two batches of the peer and of ours, and a goal
    for theirs, ours in (rows[:2], rows[2:4]):
        assert int(theirs[3]) == pytest.approx(int(ours[3]), rel=0.1, abs=2)
        assert int(ours[3]) > 0
