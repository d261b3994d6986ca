"""Two processes on one batch: the same training as one process on all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yolonas.data.dataset import DrawSampler
from yolonas.training import distributed

SCRIPT = str(Path(__file__).parent / "distributed_run.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of the same training by one process and by two."""
    folders = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for folder, launcher in zip(folders, ((), TORCHRUN), strict=True):
        command = [sys.executable, *launcher, SCRIPT, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    return folders


def results(runs: tuple[Path, Path]) -> list[dict[str, Any]]:
    return [json.loads((folder / "result.json").read_text()) for folder in runs]


def test_gives_the_weights_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = (torch.load(folder / "weights.pt", weights_only=True) for folder in runs)
    moved, different = (
        sum(float((a - b).square().sum()) for key, a in first.items() if (b := second[key]).is_floating_point()) ** 0.5
        for first, second in ((one["after"], one["before"]), (one["after"], two["after"]))
    )
    # Adam divides a gradient by its size, so where one is nothing but rounding a step may go either way.
    assert different < 0.01 * moved
    for key, value in one["after"].items():
        if "running" in key:
            torch.testing.assert_close(two["after"][key], value, rtol=1e-3, atol=1e-4)


def test_gives_the_losses_of_one_process(runs: tuple[Path, Path]) -> None:
    one, two = results(runs)
    assert [one["processes"], two["processes"]] == [1, 2]
    assert one["steps"] == two["steps"] == 4
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-4)


def test_shared_validation_puts_every_image_in_its_place(runs: tuple[Path, Path]) -> None:
    one, two = results(runs)
    assert len(one["boxes"]) == len(two["boxes"]) == 5  # which two processes cannot share evenly
    for first, second in zip(one["boxes"], two["boxes"], strict=True):
        assert abs(len(first) - len(second)) <= 0.1 * len(first)  # some score may cross the threshold
    assert two["metrics"]["objects"] == one["metrics"]["objects"] == 10
    assert two["metrics"]["ap"] == pytest.approx(one["metrics"]["ap"], abs=0.02)


def test_shares_of_a_batch_make_the_batch() -> None:
    whole = list(DrawSampler(7, 4, seed=3))
    shares = [list(DrawSampler(7, 4, seed=3, rank=rank, ranks=2)) for rank in (0, 1)]
    assert [sorted(a + b, key=lambda draw: draw.position) for a, b in zip(*shares, strict=True)] == whole
    with pytest.raises(ValueError, match="batch of 5 cannot be shared evenly by 2"):
        DrawSampler(7, 5, ranks=2)


def test_alone_nothing_is_shared() -> None:
    assert distributed.size() == 1
    assert distributed.gather(distributed.share([3, 1, 2])) == [3, 1, 2]
    assert distributed.agree(0.5, True) == [0.5, True]
    assert torch.equal(distributed.total(torch.tensor([2.0])), torch.tensor([2.0]))
