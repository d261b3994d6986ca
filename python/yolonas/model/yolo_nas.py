"""YOLO-NAS: images in, raw head maps out."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from yolonas.model.backbone import Backbone
from yolonas.model.blocks import ConvBNReLU, QARepVGG
from yolonas.model.config import REG_MAX, STRIDES, VARIANTS, Preprocessing, default_names
from yolonas.model.head import Heads, RawOutput
from yolonas.model.info import ModelInfo, describe
from yolonas.model.neck import Neck

Form = Literal["training", "partly fused", "fused"]


class YoloNAS(nn.Module):
    """YOLO-NAS in one of four sizes ("n", "s", "m", "l"), with the state_dict of super-gradients.

    `class_names` defaults to COCO's for 80 classes, `preprocessing` to that of the published COCO weights. Both travel
    with the model; the network itself sees only tensors. Raises ValueError for an unknown variant, a class count
    below 1, or names that are repeated or do not match the count.
    """

    def __init__(
        self,
        variant: str = "s",
        num_classes: int = 80,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
        if num_classes < 1:
            raise ValueError(f"num_classes {num_classes} must be at least 1")
        self.variant = variant
        self.num_classes = num_classes
        self.reg_max = REG_MAX
        self.strides = STRIDES
        self.class_names = checked_names(class_names or default_names(num_classes), num_classes)
        self.preprocessing = preprocessing or Preprocessing()
        self.backbone = Backbone(VARIANTS[variant])
        self.neck = Neck(VARIANTS[variant])
        self.heads = Heads(VARIANTS[variant], num_classes)

    def forward(self, images: Tensor) -> RawOutput:
        """Images [B, 3, H, W], float, 0..1, channels as `preprocessing` says, H and W multiples of 32 -> raw maps."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % 32 or images.shape[3] % 32:
            raise ValueError(f"images must be [B, 3, H, W] with H and W multiples of 32, not {list(images.shape)}")
        output: RawOutput = self.heads(*self.neck(*self.backbone(images)))
        return output

    @property
    def form(self) -> Form:
        """Which of the three forms this is: "training", "partly fused" or "fused"."""
        if any(isinstance(m, QARepVGG) and m.rbr_reparam is None for m in self.modules()):
            return "training"
        return "partly fused" if any(isinstance(m, nn.BatchNorm2d) for m in self.modules()) else "fused"

    def fused(self, partial: bool = False) -> YoloNAS:
        """A copy in eval mode with batch norms folded: all of them, or with `partial` only the QARepVGG blocks."""
        model = copy.deepcopy(self).eval()
        for module in model.modules():
            if isinstance(module, QARepVGG) or (isinstance(module, ConvBNReLU) and not partial):
                module.fold()
        return model

    def with_classes(
        self,
        names: Sequence[str],
        *,
        generator: torch.Generator | None = None,
        sources: Mapping[str, str] | None = None,
    ) -> YoloNAS:
        """A copy that predicts the classes `names`; everything but the class predictors is kept.

        A name the model knows (case does not matter) keeps its predictor rows; a name in `sources` starts from the
        rows of the known name it is mapped to; any other row is drawn from a normal distribution with the mean and
        the standard deviation of the old predictor, as super-gradients does, which keeps the trained bias level.
        Raises ValueError for no, repeated or empty names, and for a source that the model does not know.
        """
        names = checked_names(names, len(names))
        rows = _known_rows(self.class_names, names, sources or {})
        model = copy.deepcopy(self)
        new, kept = [i for i, row in enumerate(rows) if row is not None], [row for row in rows if row is not None]
        for head in model.heads.levels:
            old = head.cls_pred
            head.cls_pred = nn.Conv2d(old.in_channels, len(names), 1, device="meta")
            for key in ("weight", "bias"):
                values = getattr(old, key).detach()
                drawn = torch.randn((len(names), *values.shape[1:]), generator=generator).to(values)
                # correction=0: one old class has one bias, whose sample deviation is not a number
                drawn = drawn * values.std(correction=0) + values.mean()
                drawn[new] = values[kept]
                setattr(head.cls_pred, key, nn.Parameter(drawn, requires_grad=getattr(old, key).requires_grad))
        model.num_classes, model.class_names = len(names), names
        return model

    def info(self, image_size: int | tuple[int, int] = 640) -> ModelInfo:
        """Layers, parameters, operations (of the fused form at `image_size`, side or height and width) and size."""
        return describe(self, image_size)


def checked_names(names: Sequence[str], num_classes: int) -> tuple[str, ...]:
    """The names as a tuple of plain strings; ValueError where they are not `num_classes` different non-empty ones."""
    if isinstance(names, str):
        raise ValueError(f"class names must be a list of strings, not the string {names!r}")
    result = tuple(str(name) for name in names)
    if len(result) != num_classes or not result:
        raise ValueError(f"{len(result)} class names were given for {num_classes} classes")
    if "" in result or len(set(result)) != len(result):
        repeated = sorted({name for name in result if result.count(name) > 1 or not name})
        raise ValueError(f"class names must be non-empty and different; look at {repeated}")
    return result


def _known_rows(old: Sequence[str], new: Sequence[str], sources: Mapping[str, str]) -> list[int | None]:
    """For each new name the old row it starts from, or None."""
    exact = {name: row for row, name in enumerate(old)}
    folded = {name.casefold(): row for row, name in reversed(list(enumerate(old)))}
    for name, source in sources.items():
        if source.casefold() not in folded:
            raise ValueError(f"class {name!r} cannot start from {source!r}, which the model does not know")
    wanted = [name if name.casefold() in folded else sources.get(name, name) for name in new]
    return [exact.get(name, folded.get(name.casefold())) for name in wanted]
