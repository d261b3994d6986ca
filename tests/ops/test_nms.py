"""nms and batched_nms: torchvision's contract, against the greedy loop in plain torch and the reference's callback."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference


def random_boxes(seed: int, n: int, dtype: torch.dtype, scale: float = 100.0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap much, scores with ties, labels 0..2."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator, dtype=torch.float64) * scale
    size = torch.rand(n, 2, generator=generator, dtype=torch.float64) * scale
    boxes = torch.cat([corner, corner + size], 1).to(dtype)
    scores = (torch.rand(n, generator=generator) * 20).round().div(20).to(dtype)
    return boxes, scores, torch.randint(0, 3, (n,), generator=generator)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(0, 40),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    iou_threshold=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    scale=st.sampled_from([1e-3, 1.0, 640.0, 3e4]),
)
def test_equals_the_greedy_loop(seed: int, n: int, dtype: torch.dtype, iou_threshold: float, scale: float) -> None:
    boxes, scores, labels = random_boxes(seed, n, dtype, scale)
    keep = ops.batched_nms(boxes, scores, labels, iou_threshold)
    assert keep.dtype == torch.int64
    assert torch.equal(keep, reference.batched_nms(boxes, scores, labels, iou_threshold))
    assert torch.equal(ops.nms(boxes, scores, iou_threshold), reference.nms(boxes, scores, iou_threshold))
    if dtype != torch.bfloat16:
        arrays = boxes.numpy(), scores.numpy(), labels.numpy()
        assert (npops.batched_nms(*arrays, iou_threshold) == keep.numpy()).all()


def test_equals_the_reference_callback(shared: Path) -> None:
    """Threshold, top-k and class-wise NMS at the four settings of super-gradients' post-processing."""
    fixture = torch.load(shared / "vectors" / "postproc_fixture.pt", weights_only=True)
    boxes, scores = fixture["boxes"][0], fixture["scores"][0]
    for case in fixture["cases"]:
        options = case["kw"]
        if options.get("multi_label_per_box", 1.0):
            anchors, labels = (scores > options["score_threshold"]).nonzero().unbind(1)
        else:
            best, labels = scores.max(1)
            anchors = (best >= options["score_threshold"]).nonzero()[:, 0]
            labels = labels[anchors]
        values = scores[anchors, labels]
        top = values.argsort(descending=True, stable=True)[: int(options["nms_top_k"])]
        anchors, labels, values = anchors[top], labels[top], values[top]
        groups = torch.zeros_like(labels) if options.get("class_agnostic_nms") else labels
        keep = ops.batched_nms(boxes[anchors], values, groups, options["nms_threshold"])
        keep = keep[: int(options["max_predictions"])]
        actual = torch.cat([boxes[anchors[keep]], values[keep, None], labels[keep, None].float()], 1)
        assert torch.equal(actual, case["out"])


def test_identical_and_empty_boxes() -> None:
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).repeat(5000, 1)
    assert ops.nms(boxes, torch.linspace(0, 1, 5000), 0.5).tolist() == [4999]
    empty = ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert empty.shape == (0,)
    assert empty.dtype == torch.int64


def test_bad_arguments_are_named() -> None:
    boxes, scores, labels = random_boxes(0, 5, torch.float32)
    with pytest.raises(ValueError, match=r"boxes must be \[N, 4\], not of shape \[5, 3\]"):
        ops.nms(boxes[:, :3], scores, 0.5)
    with pytest.raises(ValueError, match=r"scores must be \[N\] with N = 5 boxes, not of shape \[4\]"):
        ops.nms(boxes, scores[:4], 0.5)
    with pytest.raises(ValueError, match=r"labels must be \[N\]"):
        ops.batched_nms(boxes, scores, labels[:2], 0.5)
    with pytest.raises(ValueError, match="iou_threshold must be from 0 to 1, not nan"):
        ops.nms(boxes, scores, math.nan)
    with pytest.raises(TypeError, match=r"boxes must be float16, bfloat16, float32 or float64, not torch\.int64"):
        ops.nms(boxes.long(), scores, 0.5)
    with pytest.raises(TypeError, match=r"labels must be integers or floats, not torch\.complex64"):
        ops.batched_nms(boxes, scores, scores.cfloat(), 0.5)
    with pytest.raises(TypeError, match="labels must be a tensor, not NoneType"):
        ops.batched_nms(boxes, scores, None, 0.5)
    with pytest.raises(ValueError, match="on one device"):
        ops.nms(boxes, scores.to("meta"), 0.5)
    with pytest.raises(TypeError, match="labels must be integers or floats, not <U1"):
        npops.batched_nms(boxes.numpy(), scores.numpy(), np.array(list("abcde")), 0.5)
    with pytest.raises(TypeError, match="boxes must be float16, float32 or float64, not int64"):
        npops.nms(np.zeros((2, 4), np.int64), np.zeros(2, np.float32), 0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000, 20000])
def test_cuda_equals_cpu(dtype: torch.dtype, n: int) -> None:
    boxes, scores, labels = random_boxes(n, n, dtype, 640.0)
    expected = ops.batched_nms(boxes, scores, labels, 0.5)
    assert torch.equal(ops.batched_nms(boxes.cuda(), scores.cuda(), labels.cuda(), 0.5).cpu(), expected)
