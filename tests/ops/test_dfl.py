"""dfl_decode: values and gradients against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

from ops_data import Maps, head_output, head_outputs
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

STRIDES = (8, 16, 32)


@settings(max_examples=60, deadline=None)
@given(maps=head_outputs)
def test_equals_the_reference(maps: tuple[Maps, Maps]) -> None:
    boxes = ops.dfl_decode(maps[1], STRIDES)
    assert boxes.dtype == torch.float32
    torch.testing.assert_close(boxes, reference.dfl_decode(maps[1], STRIDES), rtol=2e-6, atol=2e-4)


def test_decode_nms_and_numpy_give_the_same_boxes() -> None:
    class_logits, box_logits = head_output(1, batch=2)
    boxes = ops.dfl_decode(box_logits, STRIDES)
    out = ops.decode_nms(class_logits, box_logits, STRIDES, score_threshold=0.3, iou_threshold=0.7)
    for image in range(2):
        n = int(out.counts[image])
        assert n > 0
        assert torch.equal(out.boxes[image, :n], boxes[image, out.anchors[image, :n]])
    assert (npops.dfl_decode([m.numpy() for m in box_logits], STRIDES) == boxes.numpy()).all()
    last = [m.contiguous(memory_format=torch.channels_last) for m in box_logits]
    assert torch.equal(ops.dfl_decode(last, STRIDES), boxes)


@pytest.mark.parametrize("bins", [16, 17])
def test_gradients_equal_autograd(bins: int) -> None:
    _, box_logits = head_output(2, batch=2, bins=bins)
    weight = torch.randn(2, 106, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (ops.dfl_decode, reference.dfl_decode):
        leaves = [m.clone().requires_grad_() for m in box_logits]
        (function(leaves, STRIDES) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # gradients reach 50


def test_extreme_logits() -> None:
    logits = torch.zeros(1, 4, 17, 1, 1)
    logits[:, 0, 3] = 1e30  # far beyond the others: distance exactly 3
    logits[:, 1] = -torch.inf
    logits[:, 1, 5] = 0.0  # -inf means probability 0
    logits[:, 2] = 88.0
    box = ops.dfl_decode([logits.reshape(1, 68, 1, 1)], (2,))[0, 0]
    assert box.tolist() == [2 * (0.5 - 3), 2 * (0.5 - 5), 2 * (0.5 + 8), 2 * (0.5 + 8)]
    logits[:, 3, 0] = math.nan
    box = ops.dfl_decode([logits.reshape(1, 68, 1, 1)], (2,))[0, 0]
    assert box.isnan().tolist() == [False, False, False, True]
