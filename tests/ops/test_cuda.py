"""What only a CUDA device can show: the bits of the CPU in every path, streams, devices, no waiting, graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ops_data import Maps, head_output
from yolonas import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = "cuda"
STRIDES = [8.0, 16.0, 32.0]
GRIDS = ((40, 40), (20, 20), (10, 10))
SETTINGS: dict[str, Any] = {"score_threshold": 0.3, "iou_threshold": 0.6, "max_detections": 100}


def to_device(maps: tuple[Maps, Maps], device: str = DEVICE) -> list[Maps]:
    return [[m.to(device) for m in side] for side in maps]


def assert_same(on_device: ops.Decoded, expected: ops.Decoded) -> None:
    for field, a, b in zip(ops.Decoded._fields, on_device, expected, strict=True):
        assert torch.equal(a.cpu(), b), field


OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "all logits pass": {"score_threshold": 0.0},
    "none passes": {"score_threshold": 1.0},
    "top-k 2000": {"score_threshold": 0.1, "pre_nms_top_k": 2000, "max_detections": 1500},
    "top-k 20,000, sorted": {"score_threshold": 0.0, "pre_nms_top_k": 20_000},
    "best class alone": {"score_threshold": 0.0, "multi_label": False},
    "class-agnostic": {"class_agnostic": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_bits_of_the_cpu(options: dict[str, Any], dtype: torch.dtype) -> None:
    maps = head_output(1, batch=2, classes=20, grids=GRIDS, dtype=dtype, quantum=0.25)
    settings = SETTINGS | options
    assert_same(ops.decode_nms(*to_device(maps), STRIDES, **settings), ops.decode_nms(*maps, STRIDES, **settings))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "every other column": lambda m: m.repeat_interleave(2, 3)[..., ::2],
    "part of a larger batch": lambda m: torch.cat([m, m])[len(m) :],
    "not aligned to 16 bytes": lambda m: torch.cat([m.new_zeros(1), m.flatten()])[1:].view(m.shape),
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_memory_layout(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    maps = head_output(2, batch=2, classes=7, grids=GRIDS, dtype=dtype)
    moved = [[layout(m) for m in side] for side in to_device(maps)]
    assert_same(ops.decode_nms(*moved, STRIDES, **SETTINGS), ops.decode_nms(*maps, STRIDES, **SETTINGS))
    assert torch.equal(ops.dfl_decode(moved[1], STRIDES).cpu(), ops.dfl_decode(maps[1], STRIDES))


def test_bins_of_any_number() -> None:
    for bins in (2, 32, 33, 64):
        maps = head_output(3, bins=bins, grids=GRIDS)
        assert_same(ops.decode_nms(*to_device(maps), STRIDES, **SETTINGS), ops.decode_nms(*maps, STRIDES, **SETTINGS))


def test_many_images() -> None:
    maps = head_output(4, batch=300)  # ranks of so many are sorted, not counted
    assert_same(ops.decode_nms(*to_device(maps), STRIDES, **SETTINGS), ops.decode_nms(*maps, STRIDES, **SETTINGS))


@pytest.mark.parametrize("n", [8192, 8193, 100_000])
def test_nms_of_many_boxes(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    corners = torch.rand(n, 2, generator=generator) * 2000
    boxes = torch.cat([corners, corners + torch.rand(n, 2, generator=generator) * 60], 1)
    scores = (torch.rand(n, generator=generator) * 1000).floor()
    labels = torch.randint(3, (n,), generator=generator)
    kept = ops.batched_nms(boxes.to(DEVICE), scores.to(DEVICE), labels.to(DEVICE), 0.5)
    assert torch.equal(kept.cpu(), ops.batched_nms(boxes, scores, labels, 0.5))


def test_repeated_calls_give_the_same_bits() -> None:
    maps = to_device(head_output(5, batch=4, classes=20, grids=GRIDS, quantum=0.5))
    first = ops.decode_nms(*maps, STRIDES, **SETTINGS)
    for _ in range(50):
        for a, b in zip(ops.decode_nms(*maps, STRIDES, **SETTINGS), first, strict=True):
            assert torch.equal(a, b)


def test_calls_on_two_streams_do_not_disturb_each_other() -> None:
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    inputs = [head_output(seed, batch=2, classes=20, grids=GRIDS) for seed in (6, 7)]
    on_device = [to_device(maps) for maps in inputs]
    torch.cuda.synchronize()
    results: list[list[ops.Decoded]] = [[], []]
    for _ in range(20):
        for stream, maps, found in zip(streams, on_device, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(ops.decode_nms(*maps, STRIDES, **SETTINGS))
    torch.cuda.synchronize()
    for maps, found in zip(inputs, results, strict=True):
        expected = ops.decode_nms(*maps, STRIDES, **SETTINGS)
        for decoded in found:
            assert_same(decoded, expected)


def test_the_op_waits_for_its_stream() -> None:
    """The inputs are filled late by the stream that is current: a launch on another one would read zeros."""
    maps = head_output(8, classes=20, grids=GRIDS)
    source = to_device(maps)
    target = [[torch.zeros_like(m) for m in side] for side in source]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for side, other in zip(target, source, strict=True):
            for m, filled in zip(side, other, strict=True):
                m.copy_(filled)
        decoded = ops.decode_nms(*target, STRIDES, **SETTINGS)
    torch.cuda.synchronize()
    assert_same(decoded, ops.decode_nms(*maps, STRIDES, **SETTINGS))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_where_the_tensors_are() -> None:
    maps = head_output(9, classes=20, grids=GRIDS)
    assert torch.cuda.current_device() == 0
    decoded = ops.decode_nms(*to_device(maps, "cuda:1"), STRIDES, **SETTINGS)
    assert decoded.boxes.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_same(decoded, ops.decode_nms(*maps, STRIDES, **SETTINGS))


def test_nothing_waits_for_the_device() -> None:
    maps = to_device(head_output(10, batch=2, classes=20, grids=GRIDS))
    leaves = [m.requires_grad_() for m in maps[1]]
    ops.decode_nms(*maps, STRIDES, **SETTINGS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"pre_nms_top_k": 20_000}, {"multi_label": False}):
            ops.decode_nms(*maps, STRIDES, **SETTINGS | options)
        ops.dfl_decode(leaves, STRIDES).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", [{}, {"score_threshold": 0.0, "pre_nms_top_k": 20_000}])
def test_a_graph_replayed_on_changed_inputs_equals_eager_calls(options: dict[str, Any]) -> None:
    settings = SETTINGS | options
    maps = to_device(head_output(11, batch=2, classes=20, grids=GRIDS))
    ops.decode_nms(*maps, STRIDES, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.decode_nms(*maps, STRIDES, **settings)
    for seed in range(12, 15):
        changed = head_output(seed, batch=2, classes=20, grids=GRIDS)
        for side, others in zip(maps, changed, strict=True):
            for m, other in zip(side, others, strict=True):
                m.copy_(other)
        graph.replay()
        assert_same(captured, ops.decode_nms(*changed, STRIDES, **settings))


def test_dfl_gradients_equal_those_of_the_cpu() -> None:
    _, box_logits = head_output(15, batch=2, grids=GRIDS)
    leaves = [m.requires_grad_() for m in box_logits]
    on_device = [m.detach().to(DEVICE).requires_grad_() for m in box_logits]
    expected = torch.autograd.grad(ops.dfl_decode(leaves, STRIDES).square().sum(), leaves)
    found = torch.autograd.grad(ops.dfl_decode(on_device, STRIDES).square().sum(), on_device)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-2)
