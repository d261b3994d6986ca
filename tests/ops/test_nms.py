"""nms and batched_nms: torchvision's contract, against the greedy loop in plain torch and the reference's callback."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
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


@settings(max_examples=150)
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


SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45, 1e-30, 1e-15, 1e19]


def difficult_boxes(kind: str, rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Boxes [n, 4] whose IoUs lie near a threshold, or whose arithmetic is near the limits of floats."""
    centre, size = rng.random((n, 2)), rng.random((n, 2)) * rng.choice([0.02, 0.3])
    if kind in ("crowd", "far from the origin", "tiny areas", "huge areas"):  # around 20 objects
        objects, noise = rng.integers(0, 20, n), rng.uniform(-0.3, 0.3, (4, n, 1))
        centre, size = centre[objects] + noise[0] * size[objects], size[objects] * (1 + noise[1])
    if kind == "concentric":
        centre, size = np.full((n, 2), 0.5), np.exp(rng.uniform(-6, 0, (n, 2)))
    if kind == "lattice":  # many IoUs are the same simple fractions
        centre, size = rng.integers(0, 8, (n, 2)) / 8, rng.integers(-1, 4, (n, 2)) / 8
    boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
    if kind == "far from the origin":
        boxes += rng.choice([1.0, 1e3, 1e5])
    if kind == "special values":
        some = rng.random((n, 4)) < rng.choice([0.01, 0.3])
        boxes[some] = rng.choice(SPECIAL, int(some.sum()))
    return boxes * {"tiny areas": rng.choice([1e-14, 1e-20, 1e-21]), "huge areas": rng.choice([1e18, 1e19])}.get(
        kind, 640.0
    )


def plain_greedy(boxes: NDArray[Any], scores: NDArray[Any], labels: NDArray[Any], iou_threshold: float) -> list[int]:
    """Each box against every kept one."""
    order = np.argsort(-scores, kind="stable")
    boxes, labels, threshold = boxes[order], labels[order], boxes.dtype.type(iou_threshold)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = np.ones(len(boxes), bool)
    for i, box in enumerate(boxes):
        if alive[i]:
            width, height = np.clip(np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2]), 0, None).T
            intersection = width * height
            alive[i + 1 :] &= ~((intersection / (area + area[i] - intersection) > threshold) & (labels == labels[i]))[
                i + 1 :
            ]
    return [int(index) for index in order[alive]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=200)
@given(
    kind=st.sampled_from(
        [
            "spread",
            "crowd",
            "concentric",
            "lattice",
            "far from the origin",
            "tiny areas",
            "huge areas",
            "special values",
        ]
    ),
    seed=st.integers(0, 2**31),
    n=st.sampled_from([30, 300, 600, 1200]),
    dtype=st.sampled_from([np.float32, np.float64]),
    iou_threshold=st.sampled_from([0.0, 1e-20, 1e-3, 0.1, 1 / 3, 0.5, 0.7, 0.95, 1.0]),
    labelled=st.booleans(),
)
def test_large_groups_equal_the_greedy_loop(
    kind: str, seed: int, n: int, dtype: type, iou_threshold: float, labelled: bool
) -> None:
    """Above 272 boxes of one label an index leaves pairs out: never one that decides."""
    rng = np.random.default_rng(seed)
    boxes = difficult_boxes(kind, rng, n).astype(dtype)
    scores = (rng.integers(0, 50, n) / 50 if rng.random() < 0.5 else rng.standard_normal(n)).astype(dtype)
    labels = rng.choice([-(2**63), 5, 2**63 - 1], n) if labelled else np.zeros(n, np.int64)
    expected = plain_greedy(boxes, scores, labels, iou_threshold)
    assert npops.batched_nms(boxes, scores, labels, iou_threshold).tolist() == expected
    if not labelled:
        assert npops.nms(boxes, scores, iou_threshold).tolist() == expected


def test_areas_that_underflow() -> None:
    """Areas of 12 times the smallest float are rounded so coarsely that an IoU of 0.82 becomes 11 / 13."""
    side = 1.3e-22
    corner = np.arange(400)[:, None] * [10 * side, 0]
    boxes = np.concatenate([corner, corner + np.array([0.1 * side, 0])])
    boxes = np.concatenate([boxes, boxes + side], 1).astype(np.float32)
    scores = -np.arange(800, dtype=np.float32)
    assert npops.nms(boxes, scores, 0.84).tolist() == list(range(400))


def spread_boxes(n: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """As many boxes in an area of any size."""
    rng = np.random.default_rng(n)
    centre, size = rng.uniform(0, 20 * math.sqrt(n), (n, 2)), rng.uniform(10, 40, (n, 2))
    return np.concatenate([centre - size / 2, centre + size / 2], 1).astype(np.float32), rng.random(n, np.float32)


def process_seconds(boxes: NDArray[Any], scores: NDArray[Any], iou_threshold: float) -> float:
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        npops.nms(boxes, scores, iou_threshold)
        best = min(best, time.process_time() - start)
    return best


@pytest.mark.parametrize("iou_threshold", [0.0, 0.7])
def test_time_is_not_quadratic_where_boxes_are_spread_out(iou_threshold: float) -> None:
    few, many = spread_boxes(10_000), spread_boxes(160_000)
    ratio = process_seconds(*many, iou_threshold) / process_seconds(*few, iou_threshold)
    assert ratio < 120  # 30 to 50 measured; all pairs would be 256


def cliffs() -> dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any], int]]:
    """100,000 boxes, scores, labels, and how many of them are kept."""
    n = 100_000
    rng = np.random.default_rng(0)
    boxes, scores = spread_boxes(n)
    one, same, degenerate = np.zeros(n, np.int64), np.tile(np.float32([3, 4, 5, 6]), (n, 1)), np.zeros_like(boxes)
    apart = np.arange(n, dtype=np.float32)[:, None] * 2 + np.float32([0, 0, 1, 1])
    return {
        "identical boxes": (same, scores, one, 1),
        "identical boxes of 1,000 classes": (same, scores, rng.permutation(n) % 1000, 1000),
        "identical boxes of classes of their own": (same, scores, rng.permutation(n) * 2**40, n),
        "boxes without an area": (degenerate, scores, one, n),
        "boxes of NaN": (degenerate * np.nan, scores, one, n),
        "NaN scores": (apart, scores * np.nan, one, n),
        "equal scores": (apart, scores * 0, one, n),
        "ascending scores": (apart, np.sort(scores), one, n),
        "descending scores": (apart, np.sort(scores)[::-1], one, n),
        "one box over all others": (np.concatenate([[[-1e9, -1e9, 1e9, 1e9]], apart[1:]]), scores, one, n),
    }


def test_no_cliffs() -> None:
    for name, (boxes, scores, labels, kept) in cliffs().items():
        start = time.process_time()
        keep = npops.batched_nms(boxes.astype(np.float32), scores, labels, 0.7)
        assert time.process_time() - start < 2, name  # at most 0.1 measured
        assert len(keep) == kept, name
        order = np.argsort(-scores, kind="stable")
        assert (keep == order[np.isin(order, keep)]).all(), name


def test_memory_is_linear() -> None:
    """100,000 boxes: a bit for each pair would be 1.2 GB."""
    program = """
        import resource
        import numpy as np
        from yolonas.ops import numpy as npops
        rng = np.random.default_rng(0)
        corner = rng.uniform(0, 6000, (100_000, 2))
        boxes = np.concatenate([corner, corner + 30], 1).astype(np.float32)
        scores = rng.random(100_000, np.float32)
        npops.nms(boxes[:10], scores[:10], 0.5)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        npops.batched_nms(boxes, scores, np.zeros(100_000, np.int64), 0.5)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert int(output.stdout) < 100_000  # KiB; 20,000 measured


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
