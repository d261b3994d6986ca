"""Random head output for the tests of the ops, and what a result is compared by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from yolonas import ops
from yolonas.ops import reference

Maps = list[Tensor]


def head_output(
    seed: int,
    batch: int = 1,
    classes: int = 3,
    bins: int = 17,
    grids: Sequence[tuple[int, int]] = ((8, 10), (4, 5), (2, 3)),
    dtype: torch.dtype = torch.float32,
    quantum: float = 0.0,
) -> tuple[Maps, Maps]:
    """Class and box logits whose boxes overlap much; `quantum` rounds class logits so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    class_logits, box_logits = [], []
    for height, width in grids:
        logits = 2.0 * torch.randn(batch, classes, height, width, generator=generator)
        class_logits.append((logits / quantum).round() * quantum if quantum else logits)
        box_logits.append(3.0 * torch.randn(batch, 4 * bins, height, width, generator=generator))
    return [m.to(dtype) for m in class_logits], [m.to(dtype) for m in box_logits]


head_outputs = st.builds(
    head_output,
    seed=st.integers(0, 2**31),
    batch=st.integers(0, 3),
    classes=st.integers(1, 5),
    bins=st.sampled_from([2, 16, 17]),
    grids=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=3, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    quantum=st.sampled_from([0.0, 0.5]),
)


def assert_same(actual: ops.Decoded, expected: ops.Decoded) -> None:
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.anchors, expected.anchors)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-7)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=2e-6, atol=2e-4)


def iou_near_threshold(box_logits: Maps, strides: Sequence[float], threshold: float) -> bool:
    """Whether float noise in the boxes (the reference's exp is another one) could decide a suppression."""
    boxes = reference.dfl_decode(box_logits, strides)
    for image in boxes:
        overlap = (
            torch.minimum(image[:, None, 2:], image[None, :, 2:])
            - torch.maximum(image[:, None, :2], image[None, :, :2])
        ).clamp(min=0)
        intersection = overlap.prod(2)
        area = (image[:, 2:] - image[:, :2]).prod(1)
        iou = intersection / (area[:, None] + area[None, :] - intersection)
        if ((iou - threshold).abs() < 1e-5).any():
            return True
    return False
