"""The exponential moving average of a model's weights, which is what gets evaluated and saved."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from yolonas.model import YoloNAS


class ModelEMA:
    """Averages every parameter and batch norm statistic of a model, step by step.

    Step t uses the decay min(`decay`, (1 + t) / (10 + t)): about the last tenth of the run so far.
    """

    def __init__(self, model: YoloNAS, decay: float) -> None:
        self.model: YoloNAS = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.steps = 0
        pairs = list(zip(_state(self.model), _state(model), strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._sources = [source for _, source in pairs if source.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the model's current weights."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor], *, frozen: Collection[str] = ()) -> None:
    """Replace the batch norm statistics of a model by those of `batches`, in place, but not in children named `frozen`.

    Float32 whatever the training's precision is, as the fused network will compute.

    Averages over the last steps belong to other weights than the averaged ones, and to mosaics. After 180 steps on 30
    images of BCCD (n, 320 px) measuring them afresh took AP50 from 0.36 to 0.53. Source: "Rethinking 'Batch' in
    BatchNorm", arXiv 2105.07576, section 3.
    """
    parts = [part for name, part in model.named_children() if name not in frozen]
    norms = [module for part in parts for module in part.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _state(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
