"""INT8 imitated in floating point: what quantizing a layer costs, and a network that trains under quantization."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yolonas import ops
from yolonas.model import RawOutput, YoloNAS
from yolonas.model.config import BIT_DEPTH
from yolonas.tracing import scale_and_shift

LEVELS = 127  # of a signed int8 weight, on each side of 0
SENSITIVITY_IMAGES = 16

Range = tuple[float, float]


class QuantizedConv(nn.Module):
    """A convolution whose input and weight are rounded to int8 and back; gradients pass as if they were not.

    Weights: symmetric, per output channel, by their largest value. Input: one scale, by the range it had on the
    calibration images; unsigned where that has no negative value, as behind a ReLU.
    """

    def __init__(self, conv: nn.Conv2d | nn.ConvTranspose2d, input_range: Range) -> None:
        super().__init__()
        self.conv = conv
        self.channel_axis = 1 if isinstance(conv, nn.ConvTranspose2d) else 0
        low, high = input_range
        self.bounds = (-LEVELS, LEVELS) if low < 0 else (0, 2 * LEVELS + 1)
        self.scale = max(high / self.bounds[1], -low / LEVELS, 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, 0, *self.bounds)
        weight = rounded_weight(conv.weight, self.channel_axis)
        if isinstance(conv, nn.ConvTranspose2d):
            return F.conv_transpose2d(x, weight, conv.bias, conv.stride, conv.padding)  # type: ignore[arg-type]
        return F.conv2d(x, weight, conv.bias, conv.stride, conv.padding)


def rounded_weight(weight: Tensor, axis: int) -> Tensor:
    """The weight as int8 with one scale for each entry of `axis` would hold it, float32 again."""
    others = [d for d in range(weight.ndim) if d != axis]
    scale = (weight.detach().abs().amax(others) / LEVELS).clamp(min=1e-12)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -LEVELS, LEVELS)


def convolutions(model: nn.Module) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """The convolutions of a fused network by their module names: the layers that INT8 is about."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
    }


def network_input(model: YoloNAS, canvases: npt.NDArray[np.uint8] | Tensor) -> Tensor:
    """Canvases uint8 [B, 3, H, W] -> the float images that the model takes, normalized as its preprocessing says."""
    device = next(model.parameters()).device
    scale, shift = (values.to(device) for values in scale_and_shift(model.preprocessing))
    images = torch.as_tensor(canvases).to(device).float() * (scale / BIT_DEPTH) + shift
    return images.contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def input_ranges(model: YoloNAS, canvases: Iterable[npt.NDArray[np.uint8]]) -> dict[str, Range]:
    """Least and largest input of each convolution, as they run, of a fused network over canvases uint8 [B, 3, H, W].

    They are the means over the canvases of each one's extremes, as NNCF estimates them: one odd image does not
    stretch the scale for all.
    """
    seen: dict[str, list[Range]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            least, largest = torch.aminmax(inputs[0])
            seen.setdefault(name, []).append((float(least), float(largest)))

        return hook

    handles = [conv.register_forward_pre_hook(watch(name)) for name, conv in convolutions(model).items()]
    try:
        for batch in canvases:
            model(network_input(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: (float(np.mean([low for low, _ in r])), float(np.mean([high for _, high in r])))
        for name, r in seen.items()
    }


def fake_quantized(model: YoloNAS, ranges: Mapping[str, Range], float_layers: Collection[str] = ()) -> YoloNAS:
    """A copy of a fused network whose convolutions, but for `float_layers`, imitate INT8."""
    result = copy.deepcopy(model)
    for name, conv in convolutions(result).items():
        if name not in float_layers:
            _put(result, name, QuantizedConv(conv, ranges[name]))
    return result


def without_fake_quantization(model: YoloNAS) -> YoloNAS:
    """The fused network in a fake-quantized one: its weights in float, plain convolutions again."""
    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        if isinstance(module, QuantizedConv):
            _put(result, name, module.conv)
    return result


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@torch.inference_mode()
def sensitivity(
    model: YoloNAS,
    canvases: Sequence[npt.NDArray[np.uint8]],
    *,
    on_layer: Callable[[], object] | None = None,
) -> dict[str, float]:
    """How much the detections change when one convolution alone is quantized, for each, as they run.

    canvases: uint8 [1, 3, H, W] each. The figure is a share of all that is detected: over all points, the sum of the
    changes of class scores and of 1 - IoU of the boxes weighted by their score, over the sum of the scores. 0 is no
    change; points that detect nothing hardly count, whatever their boxes do. No labels are needed.
    """
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ranges = input_ranges(model, canvases)
    images = [network_input(model, canvas) for canvas in canvases]
    expected = [_decoded(model, image) for image in images]
    whole = sum(float(scores.sum()) for scores, _ in expected)
    found: dict[str, float] = {}
    layers = convolutions(model)
    for name, input_range in ranges.items():
        conv = layers[name]
        _put(model, name, QuantizedConv(conv, input_range))
        changed = sum(_change(_decoded(model, image), before) for image, before in zip(images, expected, strict=True))
        _put(model, name, conv)
        found[name] = changed / max(whole, 1e-12)
        if on_layer is not None:
            on_layer()
    return found


def _decoded(model: YoloNAS, images: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, A, C] and boxes [B, A, 4] canvas px of every point."""
    raw: RawOutput = model(images)
    scores = torch.cat([level.flatten(2).transpose(1, 2) for level in raw.class_logits], dim=1).sigmoid()
    return scores, ops.dfl_decode(list(raw.box_logits), model.strides)


def _change(after: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> float:
    (scores, boxes), (old_scores, old_boxes) = after, before
    sides = torch.minimum(boxes[..., 2:], old_boxes[..., 2:]) - torch.maximum(boxes[..., :2], old_boxes[..., :2])
    shared = sides.clamp(min=0).prod(-1)
    areas = sum((b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, old_boxes))
    overlap = shared / (areas - shared).clamp(min=1e-9)
    moved = old_scores.amax(-1) * (1 - overlap)
    return float((scores - old_scores).abs().sum() + moved.sum())
