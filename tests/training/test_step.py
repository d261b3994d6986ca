"""What a training step asks of its device: nothing that would make the host wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rectangles import draw
from yolonas.checkpoint import Checkpoint
from yolonas.model import YoloNAS
from yolonas.training import trainer
from yolonas.training.recipe import Recipe

# Each of these needs a value, or a size that depends on values, on the host.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")


class Spy(TorchDispatchMode):
    """Collects the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(tmp_path: Path) -> None:
    data = draw(tmp_path, 4)
    teacher = Checkpoint(YoloNAS("n", 2, class_names=data.names))
    recipe = Recipe(image_size=64, batch=4, precision="bfloat16", distillation=1.0)
    run = trainer._Run(data, data, recipe, tmp_path / "out", torch.device("cpu"), None, teacher, "n", {})
    batch = next(iter(run.batches()))
    run.train_step(batch, 0.5)  # the optimizer makes its state
    with Spy() as spy:
        run.train_step(batch, 0.5)
    assert {"convolution_backward", "topk", "_fused_adamw_"} <= spy.names, "the spy sees the whole step"
    assert not spy.names & set(WAITING)
