"""dfl_decode: values and gradients against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_data import Maps, head_output, head_outputs
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

STRIDES = (8, 16, 32)


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(maps=head_outputs, channels_last=st.booleans(), seed=st.integers(0, 2**31))
def test_gradients_equal_autograd(maps: tuple[Maps, Maps], channels_last: bool, seed: int) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generator, gradients = torch.Generator().manual_seed(seed), []
    cells = sum(m.shape[2] * m.shape[3] for m in maps[1])
    weight = torch.randn(len(maps[1][0]), cells, 4, generator=generator)
    weight[torch.rand(weight.shape[:2], generator=generator) < 0.7] = 0  # background
    for function in (ops.dfl_decode, reference.dfl_decode):
        leaves = [m.clone(memory_format=memory_format).requires_grad_() for m in maps[1]]
        (function(leaves, STRIDES) * weight).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
        for gradient, leaf in zip(gradients[0], leaves, strict=True):
            assert gradient is not None
            assert (gradient.dtype, gradient.stride()) == (leaf.dtype, leaf.stride())
    rtol = {torch.float32: 5e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[maps[1][0].dtype]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=10 * rtol)  # gradients reach 200


@pytest.mark.parametrize("bins", [1, 16, 17])
def test_gradcheck(bins: int) -> None:
    maps = [m.double()[..., :3].requires_grad_() for m in head_output(2, batch=2, bins=bins, grids=((2, 5), (1, 2)))[1]]
    assert ops.dfl_decode(maps, STRIDES[:2]).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *m: ops.dfl_decode(m, STRIDES[:2]), maps)


def test_float64_equals_the_reference() -> None:
    maps = [m.double() for m in head_output(3, batch=2)[1]]
    torch.testing.assert_close(ops.dfl_decode(maps, STRIDES), reference.dfl_decode(maps, STRIDES), rtol=0, atol=1e-12)


def test_expanded_and_transposed_maps() -> None:
    _, box_logits = head_output(5, batch=2)
    odd = [m[:1].expand(2, -1, -1, -1).transpose(2, 3) for m in box_logits]
    plain = [m.contiguous() for m in odd]
    assert torch.equal(ops.dfl_decode(odd, STRIDES), ops.dfl_decode(plain, STRIDES))
    gradients = []
    for maps in (odd, plain):
        leaves = [m.detach().requires_grad_() for m in maps]
        gradients.append(torch.autograd.grad(ops.dfl_decode(leaves, STRIDES).square().sum(), leaves))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_threads_change_nothing() -> None:
    _, box_logits = head_output(6, batch=2, grids=((40, 50), (20, 25), (10, 13)))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            leaves = [m.clone().requires_grad_() for m in box_logits]
            boxes = ops.dfl_decode(leaves, STRIDES)
            results.append([boxes, *torch.autograd.grad(boxes.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_of_what_is_not_finite() -> None:
    logits = torch.zeros(1, 4, 17, 1, 1)
    logits[:, 0, 3], logits[:, 1, 3] = math.nan, math.inf
    logits.requires_grad_()
    boxes = ops.dfl_decode([logits.reshape(1, 68, 1, 1)], (2,))
    boxes[..., 1:].sum().backward(retain_graph=True)
    assert logits.grad is not None
    assert logits.grad.isnan().any(2).flatten().tolist() == [False, True, False, False]  # no gradient, no NaN
    boxes[..., 0].sum().backward()
    assert logits.grad.isnan().any(2).flatten().tolist() == [True, True, False, False]


def test_a_second_derivative_is_refused() -> None:
    leaves = [m.requires_grad_() for m in head_output(7)[1]]
    gradient = torch.autograd.grad(ops.dfl_decode(leaves, STRIDES).square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient[0].sum().backward()


def test_wrong_gradient_is_named() -> None:
    maps = head_output(8)[1]
    with pytest.raises(ValueError, match=r"of shape \[1, 106, 4\] on cpu, not torch.float64 of shape \[1, 106, 4\]"):
        torch.ops.yolonas.dfl_decode_backward(torch.zeros(1, 106, 4, dtype=torch.float64), maps, [8.0, 16.0, 32.0])


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
