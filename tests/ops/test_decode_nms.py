"""decode_nms against the reference in plain torch, and its fixed semantics one by one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_data import Maps, head_output, head_outputs
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

STRIDES = (8, 16, 32)
SETTINGS = {"score_threshold": 0.25, "iou_threshold": 0.6}


def assert_same(actual: ops.Decoded, expected: ops.Decoded) -> None:
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.anchors, expected.anchors)
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-7)
    torch.testing.assert_close(actual.boxes, expected.boxes, rtol=2e-6, atol=2e-4)


def iou_near_threshold(class_logits: Maps, box_logits: Maps, threshold: float) -> bool:
    """Whether float noise in the boxes (the reference's exp is another one) could decide a suppression."""
    boxes = reference.dfl_decode(box_logits, STRIDES)
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


@settings(max_examples=150, deadline=None)
@given(
    maps=head_outputs,
    score_threshold=st.sampled_from([0.0, 0.05, 0.25, 0.5, 0.9, 1.0]),
    iou_threshold=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    top_k=st.sampled_from([1, 7, 1000]),
    k=st.sampled_from([1, 5, 300]),
    multi_label=st.booleans(),
    class_agnostic=st.booleans(),
)
def test_equals_the_reference(
    maps: tuple[Maps, Maps],
    score_threshold: float,
    iou_threshold: float,
    top_k: int,
    k: int,
    multi_label: bool,
    class_agnostic: bool,
) -> None:
    options = {
        "score_threshold": score_threshold,
        "iou_threshold": iou_threshold,
        "pre_nms_top_k": top_k,
        "max_detections": k,
        "multi_label": multi_label,
        "class_agnostic": class_agnostic,
    }
    if 0 < iou_threshold < 1 and iou_near_threshold(*maps, iou_threshold):
        return
    assert_same(ops.decode_nms(*maps, STRIDES, **options), reference.decode_nms(*maps, STRIDES, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("multi_label", [True, False])
def test_result_is_independent_of_memory_format_batch_and_threads(dtype: torch.dtype, multi_label: bool) -> None:
    maps = head_output(1, batch=3, classes=70, grids=((9, 11), (5, 6), (3, 3)), dtype=dtype)
    options = {**SETTINGS, "multi_label": multi_label}
    expected = ops.decode_nms(*maps, STRIDES, **options)
    assert expected.counts.min() > 5
    last = [[m.contiguous(memory_format=torch.channels_last) for m in group] for group in maps]
    padded = [[torch.nn.functional.pad(m, (1, 2, 3, 0))[..., 3:, 1:-2] for m in group] for group in maps]
    threads = torch.get_num_threads()
    try:
        for variant in (last, padded):
            for count in (1, 2):
                torch.set_num_threads(count)
                for a, b in zip(ops.decode_nms(*variant, STRIDES, **options), expected, strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)
    for image in range(3):
        alone = ops.decode_nms(*[[m[image : image + 1] for m in group] for group in maps], STRIDES, **options)
        for a, b in zip(alone, expected, strict=True):
            assert torch.equal(a[0], b[image])


def test_numpy_door_gives_the_same_bits() -> None:
    maps = head_output(2, batch=2)
    expected = ops.decode_nms(*maps, STRIDES, **SETTINGS)
    arrays = [[m.numpy() for m in group] for group in maps]
    for a, b in zip(npops.decode_nms(*arrays, STRIDES, **SETTINGS), expected, strict=True):
        assert (a == b.numpy()).all()


def test_numpy_scalars_are_numbers() -> None:
    class_logits, box_logits = head_output(2)
    options = {"score_threshold": np.float32(0.25), "iou_threshold": np.float64(0.6), "max_detections": np.int64(9)}
    out = ops.decode_nms(class_logits, box_logits, np.array(STRIDES), **options)
    arrays = [m.numpy() for m in class_logits], [m.numpy() for m in box_logits]
    assert (npops.decode_nms(*arrays, np.array(STRIDES), **options).boxes == out.boxes.numpy()).all()


def test_16_bit_inputs_compute_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        maps = head_output(3, dtype=dtype)
        wide = [[m.float() for m in group] for group in maps]
        for a, b in zip(
            ops.decode_nms(*maps, STRIDES, **SETTINGS), ops.decode_nms(*wide, STRIDES, **SETTINGS), strict=True
        ):
            assert torch.equal(a, b)


def test_every_half_and_bfloat16_converts_exactly() -> None:
    """All 65,536 bit patterns as class logits: scores show the converted value."""
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        class_logits = [values.reshape(1, 1, 256, 256)]
        box_logits = [torch.zeros(1, 8, 256, 256, dtype=dtype)]
        out = ops.decode_nms(
            class_logits,
            box_logits,
            (1e-3,),
            score_threshold=0.0,
            iou_threshold=1.0,
            pre_nms_top_k=2**16,
            max_detections=2**16,
        )
        expected = values.double().sigmoid().float()
        n = int(out.counts)
        assert n == int((expected > 0).sum())
        assert torch.equal(out.scores[0, :n], expected[out.anchors[0, :n]])
        assert (values[out.anchors[0, :n]].float().diff() <= 0).all()


def one_anchor(class_logit: float, box_logit: float = 0.0, classes: int = 1) -> tuple[Maps, Maps]:
    return [torch.full((1, classes, 1, 1), class_logit)], [torch.full((1, 68, 1, 1), box_logit)]


def count(maps: tuple[Maps, Maps], **options: float) -> int:
    return int(ops.decode_nms(*maps, (8,), **{**SETTINGS, **options}).counts)


def test_score_must_exceed_the_threshold() -> None:
    assert count(one_anchor(0.0), score_threshold=0.5) == 0
    # The next logits above 0 still round to a score of 0.5; the first that does not is a candidate.
    above = torch.tensor(0.0)
    while float(above.double().sigmoid().float()) <= 0.5:
        above = torch.nextafter(above * 2 if above > 0 else above, torch.tensor(torch.inf))
    assert count(one_anchor(float(above)), score_threshold=0.5) == 1
    assert count(one_anchor(1e30), score_threshold=1.0) == 0
    assert count(one_anchor(-50.0), score_threshold=0.0) == 1
    assert count(one_anchor(-math.inf), score_threshold=0.0) == 0


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.25, 0.3, 0.5, 0.77, 0.999])
def test_the_cutoff_is_exact_to_one_float(threshold: float) -> None:
    center = torch.tensor(math.log(threshold / (1 - threshold)))
    steps = [center]
    for _ in range(200):
        steps.append(torch.nextafter(steps[-1], torch.tensor(torch.inf)))
        steps.insert(0, torch.nextafter(steps[0], torch.tensor(-torch.inf)))
    logits = torch.stack(steps).reshape(1, 1, 1, -1)
    out = ops.decode_nms(
        [logits],
        [torch.zeros(1, 8, 1, logits.shape[3])],
        (1e-3,),
        score_threshold=threshold,
        iou_threshold=1.0,
        max_detections=1000,
    )
    scores = logits.double().sigmoid().float()
    assert int(out.counts) == int((scores > torch.tensor(threshold)).sum())


def test_nan_and_infinite_logits_never_become_boxes() -> None:
    assert count(one_anchor(math.nan)) == 0
    assert count(one_anchor(math.inf)) == 1
    for bad in (math.nan, math.inf, -math.inf):
        assert count(one_anchor(2.0, bad)) == 0
    class_logits, box_logits = head_output(5)
    box_logits[0][0, 20, 3, 3] = math.nan
    class_logits[0][0, :, 3, 3] = 9.0  # the best anchor by far
    class_logits[1][0, 1] = math.nan
    out = ops.decode_nms(class_logits, box_logits, STRIDES, **SETTINGS)
    assert int(out.counts) > 0
    assert out.boxes.isfinite().all()
    assert 33 not in out.anchors[0].tolist()


def test_ties_go_by_anchor_then_class() -> None:
    class_logits = [torch.full((1, 3, 2, 2), 1.0)]
    box_logits = [torch.zeros(1, 68, 2, 2)]
    out = ops.decode_nms(class_logits, box_logits, (1000,), score_threshold=0.5, iou_threshold=1.0, max_detections=12)
    assert out.anchors[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert out.labels[0].tolist() == [0, 1, 2] * 4


def test_order_is_by_logit_where_scores_saturate() -> None:
    class_logits = [torch.tensor([30.0, 50.0, 40.0]).reshape(1, 1, 1, 3)]
    out = ops.decode_nms(class_logits, [torch.zeros(1, 8, 1, 3)], (1,), score_threshold=0.5, iou_threshold=1.0)
    assert out.anchors[0, :3].tolist() == [1, 2, 0]
    assert out.scores[0, :3].tolist() == [1.0, 1.0, 1.0]


def test_suppression_needs_an_iou_above_the_threshold() -> None:
    # Anchor i spans [i, i + 2] x [0, 2] grid cells when every distance is 1 but the first bin's share moves it.
    def boxes(shift: float) -> Maps:
        logits = torch.full((1, 4, 17, 1, 2), -100.0)
        logits[:, :, 4] = 100.0  # distance 4 on each side: boxes of 8 x 8 cells, one cell apart
        return [logits.reshape(1, 68, 1, 2)]

    class_logits = [torch.tensor([2.0, 1.0]).reshape(1, 1, 1, 2)]
    iou = torch.tensor(56.0) / (64.0 + 64.0 - 56.0)
    at = float(iou)
    for threshold, expected in ((at, 2), (at - 1e-6, 1)):
        out = ops.decode_nms(class_logits, boxes(0.0), (1,), score_threshold=0.5, iou_threshold=threshold)
        assert int(out.counts) == expected


def test_classes_suppress_each_other_only_if_asked() -> None:
    class_logits, box_logits = one_anchor(2.0, classes=3)
    assert count((class_logits, box_logits)) == 3
    assert count((class_logits, box_logits), class_agnostic=True) == 1
    assert count((class_logits, box_logits), multi_label=False) == 1


@pytest.mark.parametrize("bins", [16, 17])
def test_bins_follow_the_channels(bins: int) -> None:
    logits = torch.full((1, 4, bins, 1, 1), -100.0)
    logits[:, :, bins - 1] = 100.0
    out = ops.decode_nms([torch.ones(1, 1, 1, 1)], [logits.reshape(1, 4 * bins, 1, 1)], (2,), **SETTINGS)
    far = 2.0 * (bins - 1)
    assert out.boxes[0, 0].tolist() == [1 - far, 1 - far, 1 + far, 1 + far]


def test_empty_inputs_give_padding() -> None:
    out = ops.decode_nms([torch.zeros(0, 3, 4, 4)], [torch.zeros(0, 68, 4, 4)], (8,), **SETTINGS)
    assert out.boxes.shape == (0, 300, 4)
    out = ops.decode_nms([torch.zeros(2, 3, 0, 4)], [torch.zeros(2, 68, 0, 4)], (8,), **SETTINGS, max_detections=2)
    assert out.boxes.tolist() == [[[0.0] * 4] * 2] * 2
    assert out.scores.tolist() == [[0.0] * 2] * 2
    assert out.labels.tolist() == out.anchors.tolist() == [[-1] * 2] * 2
    assert out.counts.tolist() == [0, 0]


def test_all_candidates_of_a_large_map() -> None:
    """Every logit passes: more candidates than any buffer of a typical image."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(1, 80, 40, 40, generator=generator)], [torch.randn(1, 68, 40, 40, generator=generator)]
    options = {"score_threshold": 0.0, "iou_threshold": 0.7}
    assert_same(ops.decode_nms(*maps, (8,), **options), reference.decode_nms(*maps, (8,), **options))


BAD_ARGUMENTS = [
    ({"score_threshold": math.nan}, ValueError, "score_threshold must be from 0 to 1, not nan"),
    ({"score_threshold": -0.1}, ValueError, "score_threshold must be from 0 to 1, not -0.1"),
    ({"iou_threshold": 1.5}, ValueError, "iou_threshold must be from 0 to 1, not 1.5"),
    ({"pre_nms_top_k": 0}, ValueError, "pre_nms_top_k must be a positive integer, not 0"),
    ({"max_detections": -3}, ValueError, "max_detections must be a positive integer, not -3"),
    ({"score_threshold": "a"}, TypeError, "score_threshold must be a number from 0 to 1, not 'a'"),
    ({"max_detections": 2.5}, TypeError, "max_detections must be a positive integer, not 2.5"),
    ({"strides": (8, 16)}, ValueError, "one stride for each of the 3 levels"),
    ({"strides": (8, 16, math.nan)}, ValueError, "strides must be positive"),
]


@pytest.mark.parametrize("door", ["torch", "numpy"])
@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(door: str, changes: dict, error: type[Exception], message: str) -> None:
    maps = head_output(0)
    options = {"strides": STRIDES, **SETTINGS, **changes}
    if door == "numpy":
        maps = [[m.numpy() for m in group] for group in maps]
    with pytest.raises(error, match=message):
        (ops if door == "torch" else npops).decode_nms(*maps, **options)


def test_bad_maps_are_named() -> None:
    class_logits, box_logits = head_output(0)
    call = lambda c, b: ops.decode_nms(c, b, STRIDES, **SETTINGS)  # noqa: E731
    with pytest.raises(ValueError, match="same levels, not 2 and 3"):
        call(class_logits[:2], box_logits)
    with pytest.raises(ValueError, match=r"4 \* bins channels, not 67"):
        call(class_logits, [m[:, :67] for m in box_logits])
    with pytest.raises(ValueError, match="must agree in batch, height and width"):
        call([m[..., :-1] for m in class_logits], box_logits)
    with pytest.raises(ValueError, match=r"of shape \[3, 8, 10\]"):
        call([m[0] for m in class_logits], box_logits)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        call([m.double() for m in class_logits], box_logits)
    with pytest.raises(TypeError, match="must have one dtype"):
        call([m.half() for m in class_logits], box_logits)
    with pytest.raises(ValueError, match="on one device"):
        call([m.to("meta") for m in class_logits], box_logits)
    with pytest.raises(TypeError, match="class_logits must be a list with a tensor per level, not Tensor"):
        call(class_logits[0], box_logits)
    with pytest.raises(TypeError, match=r"box_logits\[1\] must be a tensor, not NoneType"):
        call(class_logits, [box_logits[0], None, box_logits[2]])
    with pytest.raises(ValueError, match="1 to 8 levels"):
        ops.decode_nms([], [], (), **SETTINGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(20))
def test_cuda_gives_the_bits_of_the_cpu(dtype: torch.dtype, seed: int) -> None:
    maps = head_output(seed, batch=3, classes=11, grids=((20, 30), (10, 15), (5, 8)), dtype=dtype, quantum=0.25)
    device = [[m.cuda() for m in group] for group in maps]
    for options in (SETTINGS, {**SETTINGS, "multi_label": False}, {**SETTINGS, "class_agnostic": True}):
        for a, b in zip(
            ops.decode_nms(*device, STRIDES, **options), ops.decode_nms(*maps, STRIDES, **options), strict=True
        ):
            assert torch.equal(a.cpu(), b)
