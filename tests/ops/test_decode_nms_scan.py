"""The CPU's scan for candidates: blocks, layouts, the rising cutoff, threads that share an image."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from ops_data import Maps
from yolonas import _core, ops
from yolonas.ops import numpy as npops
from yolonas.ops import registration

NO_SUPPRESSION = {"score_threshold": 0.5, "iou_threshold": 1.0}
LAYOUTS = {
    "nchw": lambda m: m,
    "channels_last": lambda m: m.contiguous(memory_format=torch.channels_last),
    "rows apart": lambda m: torch.nn.functional.pad(m, (0, 3), value=9.0)[..., :-3],
    "columns apart": lambda m: torch.stack([m, torch.full_like(m, 9.0)], 4)[..., 0],
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
}


def boxes_for(class_logits: Maps) -> Maps:
    return [m.new_zeros(m.shape[0], 8, *m.shape[2:]) for m in class_logits]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", [-9.0, math.nan, -math.nan, -math.inf])
def test_one_candidate_is_found_wherever_it_lies(layout: str, dtype: torch.dtype, rest: float) -> None:
    classes, height, width = 3, 7, 61  # planes of 427 logits: whole blocks and a rest
    for position in range(0, classes * height * width, 5 if layout == "nchw" else 41):
        logits = torch.full((classes * height * width,), rest, dtype=dtype)
        logits[position] = 1.0
        maps = [LAYOUTS[layout](logits.reshape(1, classes, height, width))]
        out = ops.decode_nms(maps, boxes_for(maps), (8,), **NO_SUPPRESSION)
        assert out.counts.tolist() == [1]
        assert (int(out.labels[0, 0]), int(out.anchors[0, 0])) == divmod(position, height * width)


@pytest.mark.parametrize("order", ["ascending", "descending", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_best_are_kept_however_many_pass(order: str, dtype: torch.dtype) -> None:
    """Far more candidates than are held at once. -0 and +0 are one logit, so both go by their index."""
    logits = torch.linspace(-8, 8, 4 * 100 * 100).round() / 2
    logits = {"ascending": logits, "descending": logits.flip(0), "equal": torch.full_like(logits, -0.0)}[order]
    logits[::2] += 0.0
    maps = [logits.reshape(1, 4, 100, 100).to(dtype)]
    by_anchor = maps[0].flatten(2)[0].T  # [A, C]: row-major in the order of ties
    best = by_anchor.max(1, keepdim=True)
    single = torch.full_like(by_anchor, -math.inf).scatter(1, best.indices, best.values)
    for top_k in (1, 999):
        for multi_label, candidates in ((True, by_anchor), (False, single)):
            options = {"score_threshold": 0.0, "iou_threshold": 1.0, "multi_label": multi_label}
            out = ops.decode_nms(maps, boxes_for(maps), (8,), **options, pre_nms_top_k=top_k, max_detections=1000)
            expected = candidates.flatten().float().sort(descending=True, stable=True).indices[:top_k]
            assert out.counts.tolist() == [top_k]
            assert torch.equal(out.anchors[0, :top_k], expected // 4)
            assert torch.equal(out.labels[0, :top_k], expected % 4)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("multi_label", [True, False])
def test_threads_that_share_an_image_find_the_same(layout: str, multi_label: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    class_logits: list[Tensor] = [torch.randn(1, 80, n, n, generator=generator) - 3.0 for n in (200, 50)]  # 13 MB
    maps = [LAYOUTS[layout](m).numpy() for m in class_logits]
    boxes = [m.numpy() for m in boxes_for(class_logits)]
    options = {"score_threshold": 0.3, "iou_threshold": 0.7, "multi_label": multi_label}
    expected = npops.decode_nms(maps, boxes, (8, 16), **options)
    assert expected.counts[0] == 300
    for threads in (2, 3, 64):
        for a, b in zip(npops.decode_nms(maps, boxes, (8, 16), **options, threads=threads), expected, strict=True):
            assert np.array_equal(a, b)


def test_stage_times_add_up_to_the_call() -> None:
    class_logits = [torch.randn(2, 80, 80, 80)]
    box_logits = [torch.randn(2, 68, 80, 80)]
    settings = (2, 80, 17, 0.25, 0.7, 1000, 300, True, False)
    outputs = registration._decode_nms_outputs(class_logits, box_logits, [8.0], 0.25, 0.7, 1000, 300)[2]
    maps = [[registration._map(m) for m in group] for group in (class_logits, box_logits)]
    arguments = (*maps, [8.0], 0, _core.DecodeNmsOptions(*settings), [tensor.data_ptr() for tensor in outputs])
    shares = []
    for _ in range(20):  # a process that has to wait outside of the stages loses a turn
        begun = time.perf_counter()
        times = _core.decode_nms_cpu_stages(*arguments)
        shares.append(sum(times) / (time.perf_counter() - begun))
        assert all(seconds > 0 for seconds in times)
    assert max(shares) <= 1
    assert max(shares) > 0.5
    expected = ops.decode_nms(class_logits, box_logits, (8,), score_threshold=0.25, iou_threshold=0.7)
    assert torch.equal(outputs[0], expected.boxes)
