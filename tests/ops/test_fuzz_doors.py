"""Both doors on arrays of any layout and any values: equal to the bit to contiguous copies, and right by the reference.

An array is laid into memory with any order, step and direction of its dimensions, gaps full of values that would show,
some dimensions repeated without being stored, off the alignment of its type (NumPy), and up to a page that may not be
read, so that a read beyond it ends the process.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_data import Maps, assert_same, iou_near_threshold
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

Array = np.ndarray
Draw = Callable[[st.SearchStrategy], Any]
PAGE = mmap.PAGESIZE
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e30, -1e30, 1e-42, 65504.0, 88.0, -104.0], np.float32)


def guarded(size: int, flush: str) -> Array:
    """Bytes between two pages that may not be read, without room at the end or at the start."""
    room = max(-(-size // PAGE), 1) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (start, start + PAGE + room):
        assert protect(ctypes.c_void_p(page), ctypes.c_size_t(PAGE), 0) == 0
    return np.frombuffer(memory, np.uint8, size, PAGE if flush == "start" else PAGE + room - size)


def lay_out(draw: Draw, values: Array, door: str) -> tuple[Any, Array]:
    """-> the values in some layout behind a door, and as a contiguous array (different where dimensions repeat)."""
    rank, item = values.ndim, values.dtype.itemsize
    for dimension in range(rank):
        if values.shape[dimension] > 1 and draw(st.integers(0, 9)) == 0:
            values = np.repeat(values.take([0], dimension), values.shape[dimension], dimension)
    repeated = [n > 1 and bool((values == values.take([0], d)).all()) for d, n in enumerate(values.shape)]
    stored = values[tuple(slice(0, 1) if repeated[d] else slice(None) for d in range(rank))]
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in range(rank)]
    gaps = [draw(st.sampled_from([0, 0, 0, 1, 2])) for _ in range(rank)]
    extent = [max((n - 1) * step + 1, 0) + gap for n, step, gap in zip(stored.shape, steps, gaps, strict=True)]
    first = draw(st.integers(0, 3)) * item + (draw(st.integers(0, 1)) if door == "numpy" else 0)
    size = first + math.prod(extent) * item
    where = draw(st.sampled_from(["heap", "start", "end"])) if sys.platform == "linux" else "heap"
    memory = np.empty(size, np.uint8) if where == "heap" else guarded(size, where)
    memory[:] = 0xFF  # NaN in each of the types
    view = memory[first:].view(values.dtype).reshape([extent[d] for d in order]).transpose(np.argsort(order))
    view = view[tuple(slice(gap, None, step) for gap, step in zip(gaps, steps, strict=True))]
    if door == "numpy" and draw(st.booleans()):
        view = np.flip(view, draw(st.integers(0, rank - 1)))
    view[...] = stored
    if door == "torch":
        return torch.from_numpy(view).expand(values.shape), np.ascontiguousarray(values)
    array = np.broadcast_to(view, values.shape)
    array.flags.writeable = False
    return array, np.ascontiguousarray(values)


def logits(random: np.random.Generator, shape: tuple[int, ...], special: float, dtype: type) -> Array:
    values = random.normal(0, 3, shape).astype(np.float32)
    odd = random.random(shape) < special
    values[odd] = random.choice(SPECIAL, odd.sum())
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@st.composite
def maps(draw: Draw, large: bool) -> tuple[list[Array], list[Array]]:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch = draw(st.integers(0, 3))
    classes, bins = draw(st.integers(1, 70 if large else 4)), draw(st.integers(1, 18))
    side = st.integers(0, 40 if large else 5)
    grids = draw(st.lists(st.tuples(st.integers(0, 6), side), min_size=1, max_size=3))
    special, dtype = draw(st.sampled_from([0.0, 0.01, 0.3])), draw(st.sampled_from([np.float32, np.float16]))
    return tuple([logits(random, (batch, c, *grid), special, dtype) for grid in grids] for c in (classes, 4 * bins))


options = st.fixed_dictionaries(
    {
        "score_threshold": st.sampled_from([0.0, 0.01, 0.5, 0.9, 1.0]),
        "iou_threshold": st.sampled_from([0.0, 0.3, 0.7, 1.0]),
        "pre_nms_top_k": st.sampled_from([1, 3, 50, 1000]),
        "max_detections": st.sampled_from([1, 10, 300]),
        "multi_label": st.booleans(),
        "class_agnostic": st.booleans(),
    }
)


@pytest.mark.parametrize("door", ["torch", "numpy"])
@settings(max_examples=60)
@given(data=st.data(), maps=maps(large=True), options=options)
def test_maps_of_any_layout(door: str, data: st.DataObject, maps: Any, options: dict[str, Any]) -> None:
    strides = [8, 16, 32][: len(maps[0])]
    laid = [[lay_out(data.draw, m, door) for m in group] for group in maps]
    odd, plain = ([[pair[which] for pair in group] for group in laid] for which in (0, 1))
    if door == "torch":
        decoded, boxes = ops.decode_nms(*odd, strides, **options), ops.dfl_decode(odd[1], strides)
    else:
        threads = data.draw(st.integers(1, 3))
        decoded = npops.decode_nms(*odd, strides, **options, threads=threads)
        boxes = npops.dfl_decode(odd[1], strides, threads=threads)
    expected = npops.decode_nms(*plain, strides, **options)
    for actual, wanted in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    np.testing.assert_array_equal(boxes, npops.dfl_decode(plain[1], strides))
    rows = np.arange(options["max_detections"])[None] < expected.counts[:, None]
    assert np.isfinite(expected.boxes).all()
    assert (expected.labels[~rows] == -1).all()
    assert ((expected.labels[rows] >= 0) & (expected.labels[rows] < maps[0][0].shape[1])).all()


@settings(max_examples=60)
@given(maps=maps(large=False), options=options)
def test_maps_of_any_values(maps: Any, options: dict[str, Any]) -> None:
    strides = [8, 16, 32][: len(maps[0])]
    tensors: tuple[Maps, Maps] = tuple([torch.from_numpy(m) for m in group] for group in maps)
    torch.testing.assert_close(
        ops.dfl_decode(tensors[1], strides),
        reference.dfl_decode(tensors[1], strides),
        rtol=2e-6,
        atol=2e-4,
        equal_nan=True,
    )
    # At 0, float noise in two boxes that touch would decide; test_semantics.py has that threshold.
    options = {**options, "iou_threshold": max(options["iou_threshold"], 0.3)}
    if options["iou_threshold"] == 1 or not iou_near_threshold(tensors[1], strides, options["iou_threshold"]):
        assert_same(ops.decode_nms(*tensors, strides, **options), reference.decode_nms(*tensors, strides, **options))


@st.composite
def scored_boxes(draw: Draw, most: int) -> tuple[Array, Array, Array]:
    """Boxes that overlap much, some inverted, some of special values; scores with ties; labels."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    n, scale = draw(st.integers(0, most)), draw(st.sampled_from([1e-3, 1.0, 640.0, 1e18]))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    corner = random.uniform(0, 1, (n, 2))
    boxes = np.concatenate([corner, corner + random.uniform(-0.1, 1, (n, 2))], 1) * scale
    odd = random.random((n, 4)) < draw(st.sampled_from([0.0, 0.02]))
    boxes[odd] = random.choice(SPECIAL, odd.sum())
    scores = random.normal(0, 1, n).round(1)
    odd = random.random(n) < draw(st.sampled_from([0.0, 0.1]))
    scores[odd] = random.choice(SPECIAL, odd.sum())
    labels = random.integers(0, draw(st.sampled_from([1, 3, 100])), n)
    label_types = [np.int64, np.int32, np.uint8, np.int8, np.float32, np.float64]
    with np.errstate(over="ignore"):
        return boxes.astype(dtype), scores.astype(dtype), labels.astype(draw(st.sampled_from(label_types)))


@pytest.mark.parametrize("door", ["torch", "numpy"])
@settings(max_examples=100)
@given(data=st.data(), rows=scored_boxes(most=300), threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_boxes_of_any_layout(door: str, data: st.DataObject, rows: Any, threshold: float) -> None:
    laid = [lay_out(data.draw, column, door) for column in rows]
    odd, plain = ([pair[which] for pair in laid] for which in (0, 1))
    module: Any = ops if door == "torch" else npops
    expected = npops.batched_nms(*plain, threshold)
    np.testing.assert_array_equal(module.batched_nms(*odd, threshold), expected)
    np.testing.assert_array_equal(module.nms(*odd[:2], threshold), npops.nms(*plain[:2], threshold))


@settings(max_examples=100)
@given(rows=scored_boxes(most=40), threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_boxes_of_any_values(rows: Any, threshold: float) -> None:
    tensors = [torch.from_numpy(column) for column in rows]
    assert torch.equal(ops.batched_nms(*tensors, threshold), reference.batched_nms(*tensors, threshold))
    assert torch.equal(ops.nms(*tensors[:2], threshold), reference.nms(*tensors[:2], threshold))


def test_windows_that_overlap_in_memory() -> None:
    memory = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    class_logits = [memory.as_strided((2, 5, 6, 7), (11, 3, 5, 1))]
    box_logits = [memory.as_strided((2, 68, 6, 7), (1, 2, 13, 4), 17)]
    settings = {"score_threshold": 0.3, "iou_threshold": 0.5}
    actual = ops.decode_nms(class_logits, box_logits, (8,), **settings)
    assert actual.counts.min() > 3
    for a, b in zip(
        actual, ops.decode_nms([class_logits[0].clone()], [box_logits[0].clone()], (8,), **settings), strict=True
    ):
        assert torch.equal(a, b)


def test_numpy_arrays_of_other_kinds() -> None:
    boxes, scores = np.zeros((3, 4), np.float32), np.zeros(3, np.float32)
    with pytest.raises(TypeError, match="boxes must be float16, float32 or float64, not >f4"):
        npops.nms(boxes.astype(">f4"), scores, 0.5)
    assert npops.batched_nms(boxes, scores, np.zeros(3, ">i4"), 0.5).tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="logits must all be float32 or all float16, not >f4"):
        npops.dfl_decode([np.zeros((1, 68, 3, 3), ">f4")], (8,))
    for array in (boxes.astype(complex), boxes.astype(np.int32), boxes.astype(object), boxes.astype(np.longdouble)):
        with pytest.raises(TypeError, match=f"boxes must be float16, float32 or float64, not {array.dtype}"):
            npops.nms(array, scores, 0.5)
    assert npops.nms(boxes.view(np.recarray), scores, 0.5).tolist() == [0, 1, 2]
    assert npops.nms(boxes.tolist(), scores.tolist(), 0.5).tolist() == [0, 1, 2]
    records = np.zeros(9, np.dtype([("flag", "u1"), ("logit", "f4")]))  # 5 bytes apart
    records["logit"] = np.arange(9)
    packed = np.broadcast_to(records["logit"].reshape(3, 3), (1, 68, 3, 3))
    np.testing.assert_array_equal(npops.dfl_decode([packed], (8,)), npops.dfl_decode([packed.copy()], (8,)))


@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1])
def test_sizes_beyond_memory_are_errors(huge: int) -> None:
    maps = [torch.zeros(1, 1, 2, 2)], [torch.zeros(1, 68, 2, 2)]
    settings = {"score_threshold": 0.4, "iou_threshold": 1.0}
    assert ops.decode_nms(*maps, (8,), **settings, pre_nms_top_k=huge).counts.tolist() == [4]
    if huge > 2**31:  # which a large machine might have
        with pytest.raises((RuntimeError, ValueError, MemoryError)):
            ops.decode_nms(*maps, (8,), **settings, max_detections=huge)
        with pytest.raises((RuntimeError, ValueError, MemoryError)):
            npops.decode_nms(*([m.numpy() for m in g] for g in maps), (8,), **settings, max_detections=huge)
        with pytest.raises(ValueError, match="threads must be at most 2147483647, not"):
            npops.dfl_decode([maps[1][0].numpy()], (8,), threads=huge)
