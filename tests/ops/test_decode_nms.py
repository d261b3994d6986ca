"""decode_nms against the reference in plain torch; its semantics one by one are in test_semantics.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_data import Maps, assert_same, head_output, head_outputs, iou_near_threshold
from yolonas import ops
from yolonas.ops import numpy as npops
from yolonas.ops import reference

STRIDES = (8, 16, 32)
SETTINGS = {"score_threshold": 0.25, "iou_threshold": 0.6}


@settings(max_examples=150)
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
    if 0 < iou_threshold < 1 and iou_near_threshold(maps[1], STRIDES, iou_threshold):
        return
    assert_same(ops.decode_nms(*maps, STRIDES, **options), reference.decode_nms(*maps, STRIDES, **options))


def test_numpy_scalars_are_numbers() -> None:
    class_logits, box_logits = head_output(2)
    options = {"score_threshold": np.float32(0.25), "iou_threshold": np.float64(0.6), "max_detections": np.int64(9)}
    out = ops.decode_nms(class_logits, box_logits, np.array(STRIDES), **options)
    arrays = [m.numpy() for m in class_logits], [m.numpy() for m in box_logits]
    assert (npops.decode_nms(*arrays, np.array(STRIDES), **options).boxes == out.boxes.numpy()).all()


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
    ({"strides": (8, 16, 0)}, ValueError, "strides must be positive"),
    ({"strides": (8, 16, 1e39)}, ValueError, "strides must be positive and finite in float32, not"),
    ({"strides": (8, 16, 1e-46)}, ValueError, "strides must be positive and finite in float32, not"),
    ({"strides": 8}, TypeError, "strides must be a list with a number per level, not 8"),
    ({"strides": (8, 16, "a")}, TypeError, "strides must be a list with a number per level, not"),
    (
        {"pre_nms_top_k": 2**63},
        ValueError,
        "pre_nms_top_k must be at most 9223372036854775807, not",
    ),
    ({"max_detections": 2**64}, ValueError, "max_detections must be at most 9223372036854775807, not"),
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
