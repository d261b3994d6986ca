"""What csrc/README.md fixes, a test for each sentence: on tensors, on NumPy arrays, on a GPU, and in the reference."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from ops_data import Maps, head_output
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

INF, NAN = math.inf, math.nan
STRIDES = (8, 16, 32)
SETTINGS = {"score_threshold": 0.25, "iou_threshold": 0.6}


class Door(NamedTuple):
    """The ops behind one door, from CPU tensors to CPU tensors."""

    decode_nms: Callable[..., ops.Decoded]
    dfl_decode: Callable[..., Tensor]
    nms: Callable[..., Tensor]
    batched_nms: Callable[..., Tensor]


def behind(module: Any, send: Callable[[Tensor], Any], receive: Callable[[Any], Tensor]) -> Door:
    def sent(value: Any) -> Any:
        if isinstance(value, list):
            return [send(item) for item in value]
        return send(value) if isinstance(value, Tensor) else value

    def through(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(module, name)(*map(sent, arguments), **options)
            return ops.Decoded(*map(receive, result)) if isinstance(result, tuple) else receive(result)

        return call

    return Door(*map(through, Door._fields))


def to_numpy(tensor: Tensor) -> np.ndarray:
    # NumPy has no bfloat16: its float32, which is what the ops compute in, takes its place.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


DOORS = {
    "torch": behind(ops, lambda t: t, lambda t: t),
    "numpy": behind(npops, to_numpy, torch.from_numpy),
    "reference": behind(reference, lambda t: t, lambda t: t),
    "cuda": behind(ops, lambda t: t.cuda(), lambda t: t.cpu()),
}
on_cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["torch", "numpy", "reference", on_cuda])
def door(request: pytest.FixtureRequest) -> Door:
    return DOORS[request.param]


@pytest.fixture(params=["torch", "numpy", on_cuda])
def compiled(request: pytest.FixtureRequest) -> Door:
    """Without the reference, whose sums have torch's order."""
    return DOORS[request.param]


def row(logits: Sequence[float], classes: int = 1, bins: int = 17) -> tuple[Maps, Maps]:
    """A level of one row: class logits by anchor, then class; boxes of all anchors overlap."""
    class_logits = torch.tensor(logits).reshape(1, -1, classes).permute(0, 2, 1)[:, :, None].contiguous()
    return [class_logits], [torch.zeros(1, 4 * bins, 1, class_logits.shape[3])]


def decode(door: Door, maps: tuple[Maps, Maps], stride: float = 8, **options: Any) -> list[tuple[int, int]]:
    """-> (anchor, class) of each detection."""
    out = door.decode_nms(*maps, (stride,), **{**SETTINGS, **options})
    n = int(out.counts[0])
    return list(zip(out.anchors[0, :n].tolist(), out.labels[0, :n].tolist(), strict=True))


def test_every_sentence_of_the_readme_has_its_test() -> None:
    readme = (Path(__file__).resolve().parents[2] / "csrc" / "README.md").read_text()
    semantics = readme.partition("## What is fixed")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(test_\w+)`", semantics))
    here = {name for name in globals() if name.startswith("test_")} - {"test_every_sentence_of_the_readme_has_its_test"}
    assert named == here
    for sentence in semantics.split("\n- ")[1:]:
        assert re.search(r"`test_\w+`", sentence), sentence


# Candidates.


def test_a_score_must_exceed_the_threshold(door: Door) -> None:
    assert decode(door, row([0.0]), score_threshold=0.5) == []
    # The next logits above 0 still round to a score of 0.5; the first that does not is a candidate.
    above = torch.tensor(0.0)
    while float(above.double().sigmoid().float()) <= 0.5:
        above = torch.nextafter(above * 2 if above > 0 else above, torch.tensor(INF))
    assert decode(door, row([float(above)]), score_threshold=0.5) == [(0, 0)]


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 0.999])
def test_the_cutoff_is_exact_to_one_float(door: Door, threshold: float) -> None:
    low, high = torch.tensor(-20.0), torch.tensor(20.0)
    for _ in range(60):  # towards the smallest logit whose score exceeds the threshold
        middle = (low + high) / 2
        low, high = (low, middle) if middle.double().sigmoid().float() > threshold else (middle, high)
    steps = [high]
    for _ in range(100):
        steps.append(torch.nextafter(steps[-1], torch.tensor(INF)))
        steps.insert(0, torch.nextafter(steps[0], torch.tensor(-INF)))
    logits = torch.stack(steps)
    scores = logits.double().sigmoid().float()
    expected = (scores > torch.tensor(threshold)).nonzero()[:, 0].tolist()
    assert len(expected) > 50
    assert 0 not in expected
    found = decode(door, row(logits.tolist()), score_threshold=threshold, iou_threshold=1.0, stride=1e-3)
    assert sorted(anchor for anchor, _ in found) == expected


def test_threshold_0_admits_every_score_above_0_and_threshold_1_none(door: Door) -> None:
    # exp(-103.5) is above half the smallest float, exp(-104.5) below.
    logits = [-103.5, -104.5, -1e30, -INF, 50.0, INF]
    assert [a for a, _ in decode(door, row(logits), score_threshold=0.0, iou_threshold=1.0)] == [5, 4, 0]
    assert decode(door, row(logits), score_threshold=1.0) == []


def test_a_nan_class_logit_is_no_candidate_and_an_infinite_one_scores_1(door: Door) -> None:
    assert decode(door, row([NAN, -NAN, 1.0]), score_threshold=0.0) == [(2, 0)]
    out = door.decode_nms(*row([INF]), (8,), **SETTINGS)
    assert out.scores[0, :2].tolist() == [1.0, 0.0]
    # Of one class alone: the anchor's others are what they were.
    assert decode(door, row([NAN, 1.0], classes=2)) == [(0, 1)]
    assert decode(door, row([NAN, 1.0], classes=2), multi_label=False) == [(0, 1)]


def test_with_multi_label_every_class_of_an_anchor_is_a_candidate(door: Door) -> None:
    assert decode(door, row([1.0, 3.0, 2.0], classes=3)) == [(0, 1), (0, 2), (0, 0)]


def test_without_multi_label_only_the_best_class_is_and_the_lowest_of_equals(door: Door) -> None:
    assert decode(door, row([1.0, 3.0, 2.0], classes=3), multi_label=False) == [(0, 1)]
    assert decode(door, row([1.0, 3.0, 3.0], classes=3), multi_label=False) == [(0, 1)]
    assert decode(door, row([-0.0, 0.0], classes=2), multi_label=False) == [(0, 0)]
    assert decode(door, row([-INF, NAN, -9.0], classes=3), multi_label=False, score_threshold=0.0) == [(0, 2)]


# Order and selection.


def test_order_is_by_logit_where_scores_are_equal(door: Door) -> None:
    out = door.decode_nms(*row([30.0, 50.0, 40.0]), (1,), score_threshold=0.5, iou_threshold=1.0)
    assert out.anchors[0, :3].tolist() == [1, 2, 0]
    assert out.scores[0, :3].tolist() == [1.0, 1.0, 1.0]


def test_equal_logits_go_by_anchor_then_class(door: Door) -> None:
    maps = [torch.full((1, 3, 2, 2), 1.0)], [torch.zeros(1, 68, 2, 2)]
    everything = [(anchor, label) for anchor in range(4) for label in range(3)]
    assert decode(door, maps, iou_threshold=1.0) == everything
    assert decode(door, row([-0.0, 0.0, -0.0]), iou_threshold=1.0) == [(0, 0), (1, 0), (2, 0)]
    levels = [torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 1)], [torch.zeros(1, 8, 1, 2), torch.zeros(1, 8, 1, 1)]
    out = door.decode_nms(*levels, (8, 16), score_threshold=0.5, iou_threshold=1.0)
    assert out.anchors[0, :3].tolist() == [0, 1, 2]  # counted over the levels


def test_the_best_candidates_enter_the_nms_and_ties_at_the_cut_go_the_same_way(door: Door) -> None:
    logits = [1.0, 2.0, 1.0, 3.0, 1.0]
    assert decode(door, row(logits), iou_threshold=1.0, pre_nms_top_k=4) == [(3, 0), (1, 0), (0, 0), (2, 0)]
    # Candidates that others suppress count: the second best box is the best one's, the third does not enter.
    same = row([3.0, 2.0, 1.0])
    same[1][0][:] = -100.0
    same[1][0][:, 16::17] = 100.0
    assert decode(door, same, pre_nms_top_k=2) == [(0, 0)]


def test_the_first_kept_are_the_result(door: Door) -> None:
    maps = head_output(0, grids=((8, 10),))
    everything = decode(door, maps, max_detections=300)
    assert len(everything) > 20
    for k in (1, 5, 20):
        assert decode(door, maps, max_detections=k) == everything[:k]


# Boxes.


@pytest.mark.parametrize("bins", [2, 16, 17])
def test_boxes_are_the_expected_distances_around_the_cell_times_the_stride_and_not_clipped(
    door: Door, bins: int
) -> None:
    logits = torch.full((1, 4, bins, 2, 3), -100.0)
    for side, distance in enumerate((bins - 1, 0, 1, bins // 2)):
        logits[:, side, distance] = 100.0
    logits[0, 0, :, 0, 0] = 0.0  # all bins alike: the mean
    boxes = door.dfl_decode([logits.reshape(1, 4 * bins, 2, 3)], (8,))
    far, mean, down = bins - 1, (bins - 1) / 2, bins // 2
    expected = [
        [8 * (x + 0.5 - (mean if (x, y) == (0, 0) else far)), 8 * (y + 0.5), 8 * (x + 1.5), 8 * (y + 0.5 + down)]
        for y in range(2)
        for x in range(3)
    ]
    assert boxes[0].tolist() == expected
    out = door.decode_nms([torch.ones(1, 1, 2, 3)], [logits.reshape(1, 4 * bins, 2, 3)], (8,), **SETTINGS)
    for box, anchor in zip(out.boxes[0, : out.counts[0]], out.anchors[0], strict=False):
        assert box.tolist() == expected[anchor]


def test_a_bin_of_minus_infinity_has_no_share(door: Door) -> None:
    logits = torch.zeros(1, 4, 17, 1, 1)
    logits[:, 0, 3] = 1e30  # far beyond the others: distance exactly 3
    logits[:, 1] = -INF
    logits[:, 1, 5] = 0.0
    logits[:, 2] = 88.0  # no overflow
    assert door.dfl_decode([logits.reshape(1, 68, 1, 1)], (2,))[0, 0].tolist() == [-5.0, -9.0, 17.0, 17.0]


def bad_boxes() -> list[Tensor]:
    """Box logits [1, 68, 1, 1] that give no box."""
    bad = []
    for value in (NAN, INF):
        logits = torch.zeros(1, 68, 1, 1)
        logits[0, 40] = value
        bad.append(logits)
    logits = torch.zeros(1, 68, 1, 1)
    logits[0, 17:34] = -INF
    return [*bad, logits]


@pytest.mark.parametrize("kind", range(3))
def test_a_side_with_nan_or_plus_infinity_or_only_minus_infinity_is_nan(door: Door, kind: int) -> None:
    box = door.dfl_decode([bad_boxes()[kind]], (8,))[0, 0]
    assert box.isnan().sum() == 1
    assert decode(door, ([torch.full((1, 1, 1, 1), 2.0)], [bad_boxes()[kind]])) == []


@pytest.mark.parametrize("kind", range(3))
def test_such_a_box_is_dropped_after_the_selection_and_suppresses_nothing(door: Door, kind: int) -> None:
    class_logits, box_logits = row([9.0, 2.0])
    box_logits[0][:, :, :, :1] = bad_boxes()[kind]
    assert decode(door, (class_logits, box_logits), iou_threshold=0.0) == [(1, 0)]
    assert decode(door, (class_logits, box_logits), pre_nms_top_k=1) == []


# Suppression, in decode_nms and in nms and batched_nms.


def test_an_iou_must_exceed_the_threshold(door: Door) -> None:
    class_logits, box_logits = row([2.0, 1.0])
    box_logits[0][:] = -100.0
    box_logits[0][:, 4::17] = 100.0  # distance 4 on each side: boxes of 8 x 8 cells, one cell apart
    at = float(torch.tensor(56.0) / (64.0 + 64.0 - 56.0))
    for threshold, expected in ((at, [0, 1]), (at - 1e-6, [0])):
        found = decode(door, (class_logits, box_logits), stride=1, iou_threshold=threshold)
        assert [anchor for anchor, _ in found] == expected
    boxes, scores = torch.tensor([[0.0, 0.0, 8.0, 8.0], [1.0, 0.0, 9.0, 8.0]]), torch.tensor([2.0, 1.0])
    assert door.nms(boxes, scores, at).tolist() == [0, 1]
    assert door.nms(boxes, scores, at - 1e-6).tolist() == [0]


def test_threshold_1_suppresses_nothing_and_threshold_0_what_overlaps(door: Door) -> None:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    scores = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert door.nms(boxes, scores, 1.0).tolist() == [0, 1, 2, 3]
    assert door.nms(boxes, scores, 0.0).tolist() == [0, 2]  # boxes that touch do not overlap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_iou_is_one_rounded_division(door: Door, dtype: torch.dtype) -> None:
    """At a threshold of just this quotient nothing is suppressed, at the next lower number the box is."""
    array = {torch.float32: np.float32, torch.float64: np.float64}[dtype]
    random = np.random.default_rng(0)
    for _ in range(50):
        corners = random.uniform(0, 30, (2, 2))
        a, b = np.concatenate([corners, corners + random.uniform(20, 60, (2, 2))], 1).astype(array)
        width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        if width <= 0 or height <= 0:
            continue
        intersection = width * height
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        iou = intersection / (areas[0] + areas[1] - intersection)
        boxes, scores = torch.from_numpy(np.stack([a, b])), torch.tensor([2.0, 1.0])
        assert door.nms(boxes, scores, float(iou)).tolist() == [0, 1]
        assert door.nms(boxes, scores, float(np.nextafter(iou, array(0)))).tolist() == [0]


def test_a_threshold_is_rounded_to_the_type_of_the_boxes(door: Door) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 1.0], [0.0, 0.0, 3.0, 1.0]])  # IoU 0.3
    assert float(torch.tensor(0.3)) > 0.3
    assert door.nms(boxes, torch.tensor([2.0, 1.0]), 0.3).tolist() == [0, 1]
    assert door.nms(boxes.double(), torch.tensor([2.0, 1.0]), 0.3).tolist() == [0, 1]
    assert door.nms(boxes.double(), torch.tensor([2.0, 1.0]), math.nextafter(0.3, 0)).tolist() == [0]


def test_boxes_suppress_their_own_class_alone_unless_agnostic(door: Door) -> None:
    maps = row([1.0, 3.0, 2.0], classes=3)
    assert decode(door, maps) == [(0, 1), (0, 2), (0, 0)]
    assert decode(door, maps, class_agnostic=True) == [(0, 1)]
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(3, 1), torch.tensor([1.0, 3.0, 2.0])
    assert door.batched_nms(boxes, scores, torch.tensor([7, 8, 7]), 0.5).tolist() == [1, 2]
    assert door.nms(boxes, scores, 0.5).tolist() == [1]


def test_labels_are_compared_and_not_made_into_offsets(door: Door) -> None:
    """Boxes offset by class, as torchvision has them, run into the next class's; exact code has no offsets."""
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1e8, 1e8]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert door.batched_nms(boxes, scores, torch.tensor([0, 5, 10]), 0.5).tolist() == [0, 1, 2]
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(4, 1)
    labels = torch.tensor([-(2**62), 2**62, -(2**62), 2**62])
    for any_integers in (labels, labels.sign().to(torch.int8), labels.eq(2**62).to(torch.uint8)):
        assert door.batched_nms(boxes, torch.tensor([0.1, 0.4, 0.3, 0.2]), any_integers, 0.5).tolist() == [1, 2]


def test_labels_may_be_floats_which_are_not_rounded(door: Door) -> None:
    """As torchvision has it: YOLOX passes a column of its float32 detections, Segment Anything float32 zeros."""
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(5, 1), torch.tensor([0.5, 0.4, 0.3, 0.2, 0.1])
    labels = torch.tensor([0.0, -0.0, 0.5, 1.0, 1.0])
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        assert door.batched_nms(boxes, scores, labels.to(dtype), 0.5).tolist() == [0, 2, 3]
    assert door.batched_nms(boxes, scores, labels > 0, 0.5).tolist() == [0, 2]


def test_boxes_without_area_are_kept(door: Door) -> None:
    """0 / 0 is NaN, which is not above the threshold: as torchvision does."""
    points = torch.tensor([[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0], [0.0, 3.0, 9.0, 3.0], [0.0, 0.0, 9.0, 9.0]])
    for order in ([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        assert len(door.nms(points, torch.tensor(order), 0.0)) == 4


def test_inverted_boxes_overlap_nothing(door: Door) -> None:
    boxes = torch.tensor([[6.0, 0.0, 4.0, 9.0], [0.0, 6.0, 9.0, 4.0], [6.0, 6.0, 4.0, 4.0], [0.0, 0.0, 9.0, 9.0]])
    for order in ([4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        twice, scores = boxes.repeat(2, 1)[:7], torch.tensor([*order, *order[:3]]) - torch.tensor([0.0] * 4 + [0.5] * 3)
        assert len(door.nms(twice, scores, 0.0)) == 7


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("side", range(4))
def test_boxes_with_nan_or_an_infinite_side_overlap_nothing(door: Door, value: float, side: int) -> None:
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(4, 1)
    boxes[:2, side] = value
    assert door.nms(boxes, torch.tensor([4.0, 2.0, 3.0, 1.0]), 0.0).tolist() == [0, 2, 1]
    everywhere = torch.tensor([[-INF, -INF, INF, INF], [0.0, 0.0, 9.0, 9.0]])
    assert door.nms(everywhere, torch.tensor([2.0, 1.0]), 0.0).tolist() == [0, 1]


def test_huge_coordinates_are_exact_until_the_sum_of_two_areas_overflows(door: Door) -> None:
    scores = torch.tensor([2.0, 1.0])
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.0, 1.0, 1.0]])
    for scale, kept in ((2.0**63, 1), (2.0**64, 2)):  # areas of 2^126 and 2^128 px
        assert len(door.nms(boxes * scale, scores, 0.4)) == kept
    assert len(door.nms((boxes * 2.0**64).double(), scores, 0.4)) == 1  # computed in float64
    # Away from the origin, as far as the type itself resolves the sides.
    assert len(door.nms(boxes * 2 + 2.0**23, scores, 0.4)) == 1
    assert len(door.nms(boxes * 1e-12, scores, 0.4)) == 1


def test_ties_of_scores_go_by_index_nan_comes_first_and_zeros_are_equal(door: Door) -> None:
    boxes = torch.arange(8.0)[:, None] * 10 + torch.tensor([0.0, 0.0, 1.0, 1.0])
    scores = torch.tensor([0.5, NAN, -0.0, 0.0, -INF, 0.5, INF, NAN])
    assert door.nms(boxes, scores, 0.5).tolist() == [1, 7, 6, 0, 5, 2, 3, 4]


# Types and layouts.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_compute_in_float32(door: Door, dtype: torch.dtype) -> None:
    maps = head_output(3, dtype=dtype)
    wide = [[m.float() for m in group] for group in maps]
    for a, b in zip(
        door.decode_nms(*maps, STRIDES, **SETTINGS), door.decode_nms(*wide, STRIDES, **SETTINGS), strict=True
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(door.dfl_decode(maps[1], STRIDES), door.dfl_decode(wide[1], STRIDES))
    generator = torch.Generator().manual_seed(0)
    corner, size = torch.rand(2, 60, 2, generator=generator) * 250
    boxes, scores = torch.cat([corner, corner + size], 1).to(dtype), torch.rand(60, generator=generator).to(dtype)
    assert torch.equal(door.nms(boxes, scores, 0.4), door.nms(boxes.float(), scores.float(), 0.4))
    if dtype == torch.float16:  # areas beyond 65,504, in which offsets by class would overflow too
        assert (
            door.nms(torch.tensor([[0, 0, 6e4, 6e4], [0, 0, 6e4, 5e4]], dtype=dtype), scores[:2].sort()[0], 0.5).numel()
            == 1
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_converts_exactly(door: Door, dtype: torch.dtype) -> None:
    """All 65,536 bit patterns as class logits: scores show the converted value."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if door is DOORS["reference"]:
        values = values[::512]  # its NMS is quadratic in Python
    n = len(values)
    out = door.decode_nms(
        [values.reshape(1, 1, 1, n)],
        [torch.zeros(1, 8, 1, n, dtype=dtype)],
        (1e-3,),
        score_threshold=0.0,
        iou_threshold=1.0,
        pre_nms_top_k=2**16,
        max_detections=2**16,
    )
    expected = values.double().sigmoid().float()
    count = int(out.counts)
    assert count == int((expected > 0).sum()) > n // 5
    assert torch.equal(out.scores[0, :count], expected[out.anchors[0, :count]])
    assert (values[out.anchors[0, :count]].float().diff() <= 0).all()


def test_float64_boxes_or_scores_compute_in_float64(door: Door) -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    scores = torch.tensor([1.0, 1.0 + 1e-12], dtype=torch.float64)
    assert door.nms(boxes, scores, 0.5).tolist() == [1]  # equal in float32, and then the first
    assert door.nms(boxes.float(), scores, 0.5).tolist() == [1]
    assert door.nms(boxes, scores.float(), 0.5).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multi_label", [True, False])
def test_results_depend_on_neither_memory_format_nor_batch_nor_threads(
    compiled: Door, dtype: torch.dtype, multi_label: bool
) -> None:
    maps = head_output(1, batch=3, classes=70, grids=((9, 11), (5, 6), (3, 3)), dtype=dtype)
    options = {**SETTINGS, "multi_label": multi_label}
    expected = compiled.decode_nms(*maps, STRIDES, **options)
    assert expected.counts.min() > 5
    last = [[m.contiguous(memory_format=torch.channels_last) for m in group] for group in maps]
    padded = [[torch.nn.functional.pad(m, (1, 2, 3, 0))[..., 3:, 1:-2] for m in group] for group in maps]
    threads = torch.get_num_threads()
    try:
        for variant in (maps, last, padded):
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                more = {"threads": count} if compiled is DOORS["numpy"] else {}
                for a, b in zip(compiled.decode_nms(*variant, STRIDES, **options, **more), expected, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    for image in range(3):
        alone = compiled.decode_nms(*[[m[image : image + 1] for m in group] for group in maps], STRIDES, **options)
        for a, b in zip(alone, expected, strict=True):
            assert torch.equal(a[0], b[image])


def test_both_doors_give_the_same_bits() -> None:
    maps = head_output(2, batch=2)
    arrays = [[m.numpy() for m in group] for group in maps]
    for a, b in zip(
        npops.decode_nms(*arrays, STRIDES, **SETTINGS), ops.decode_nms(*maps, STRIDES, **SETTINGS), strict=True
    ):
        assert (a == b.numpy()).all()
    boxes = ops.dfl_decode(maps[1], STRIDES)
    assert (npops.dfl_decode(arrays[1], STRIDES) == boxes.numpy()).all()


def test_rows_past_the_count_are_padding(door: Door) -> None:
    out = door.decode_nms([torch.zeros(0, 3, 4, 4)], [torch.zeros(0, 68, 4, 4)], (8,), **SETTINGS)
    assert [tuple(t.shape) for t in out] == [(0, 300, 4), (0, 300), (0, 300), (0, 300), (0,)]
    for maps in (
        ([torch.zeros(2, 3, 0, 4)], [torch.zeros(2, 68, 0, 4)]),
        ([torch.full((2, 3, 1, 1), -9.0)], [torch.zeros(2, 68, 1, 1)]),
    ):
        out = door.decode_nms(*maps, (8,), **SETTINGS, max_detections=2)
        assert out.boxes.tolist() == [[[0.0] * 4] * 2] * 2
        assert out.scores.tolist() == [[0.0] * 2] * 2
        assert out.labels.tolist() == out.anchors.tolist() == [[-1] * 2] * 2
        assert out.counts.tolist() == [0, 0]
    assert [t.dtype for t in out] == [torch.float32, torch.float32, torch.int64, torch.int64, torch.int64]
    empty = door.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert (tuple(empty.shape), empty.dtype) == ((0,), torch.int64)
