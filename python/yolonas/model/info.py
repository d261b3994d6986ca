"""What a model is made of: layers, parameters, operations, size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from yolonas.model.config import Preprocessing

if TYPE_CHECKING:
    from yolonas.model.yolo_nas import YoloNAS


@dataclass(frozen=True)
class ModelInfo:
    """The figures of a model.

    layers: convolutions of the fused form. parameters: those that compute something in the form the model has now;
    parameters_fused: those left after fusing; parameters_published: the training form with the unused placeholders of
    super-gradients, which is how 19.0 / 51.1 / 66.9 M were published. gmacs: multiply-adds of one fused forward pass
    at `image_size`, in 1e9; gflops: twice that. size_mb: bytes of parameters and buffers in 1e6.
    """

    variant: str
    form: str
    image_size: tuple[int, int]
    layers: int
    parameters: int
    parameters_fused: int
    parameters_published: int
    gmacs: float
    gflops: float
    size_mb: float
    num_classes: int
    class_names: tuple[str, ...]
    preprocessing: Preprocessing

    def __str__(self) -> str:
        height, width = self.image_size
        p = self.preprocessing
        order = "" if p.mean is None and p.std is None else f", mean {p.mean}, std {p.std}"
        return "\n".join(
            [
                f"YOLO-NAS-{self.variant.upper()}, {self.form} form",
                f"layers         {self.layers} convolutions (fused form)",
                f"parameters     {self.parameters:,} in this form, {self.parameters_fused:,} fused; "
                f"{self.parameters_published:,} as published (with unused placeholders)",
                f"operations     {self.gflops:.2f} GFLOPs = {self.gmacs:.2f} GMACs at {height}x{width}, fused",
                f"size           {self.size_mb:.1f} MB",
                f"classes        {self.num_classes}: {', '.join(self.class_names)}",
                f"preprocessing  {p.channels.upper()}, longest side to {p.resize_to} ({p.rounding}), {p.pad} padding "
                f"with {p.pad_value} to {p.image_size[0]}x{p.image_size[1]}, 1/255{order}",
            ]
        )


def describe(model: YoloNAS, image_size: int | tuple[int, int] = 640) -> ModelInfo:
    """The figures of `model` at `image_size` (one side, or height and width; multiples of 32)."""
    from yolonas.model.yolo_nas import YoloNAS

    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    with torch.device("meta"):  # shapes only: a second model costs no memory, and a forward pass no time
        training = YoloNAS(model.variant, model.num_classes, class_names=model.class_names)
        fused = training.fused()
        macs = count_macs(fused, torch.empty(1, 3, height, width))
    tensors = [*model.parameters(), *model.buffers()]
    placeholders = [v for k, v in training.state_dict().items() if ".rbr_reparam." in k]
    return ModelInfo(
        variant=model.variant,
        form=model.form,
        image_size=(height, width),
        layers=sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in fused.modules()),
        parameters=_numel(model.parameters()),
        parameters_fused=_numel(fused.parameters()),
        parameters_published=_numel(training.parameters()) + _numel(placeholders),
        gmacs=macs / 1e9,
        gflops=2 * macs / 1e9,
        size_mb=sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        num_classes=model.num_classes,
        class_names=model.class_names,
        preprocessing=model.preprocessing,
    )


def count_macs(model: nn.Module, images: Tensor) -> int:
    """Multiply-adds of the convolutions in one forward pass on `images` [B, 3, H, W]; biases are not counted."""
    total = 0

    def count(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        # a transposed convolution applies its kernel once per input position, a convolution once per output position
        positions = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += module.weight.numel() * positions.shape[0] * math.prod(positions.shape[2:])

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def _numel(tensors: Any) -> int:
    return sum(t.numel() for t in tensors)
