"""The letterbox against super-gradients' own result, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolonas.inference.letterbox import letterbox, letterbox_into
from yolonas.inference.sources import read_image
from yolonas.model.config import Preprocessing

PHOTOGRAPHS = ("000000000030", "000000000072", "000000000086")


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_equals_the_reference_to_the_last_bit(shared: Path, name: str) -> None:
    image = read_image(shared / "data/coco_permissive/images" / f"{name}.jpg")
    expected = np.load(shared / f"vectors/preproc_{name}.npz")["chw_uint8_rgb"]
    padding = json.loads((shared / "vectors/preproc_fixture.json").read_text())[f"{name}.jpg"]["metadata"]
    canvas, placement = letterbox(image, Preprocessing())
    np.testing.assert_array_equal(canvas.transpose(2, 0, 1), expected)
    planes = np.zeros_like(expected)
    assert letterbox_into(planes, image, Preprocessing()) == placement
    np.testing.assert_array_equal(planes, expected)
    assert placement.scale == padding[0][1]["scale_factor_h"]
    assert [placement.top, placement.left] == [padding[1][1]["padding_coordinates"][side] for side in ("top", "left")]


def image_of(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("rounding", "height_of_content"),
    [("round", 424), ("int", 423)],  # 640 / 1000 * 662 = 423.68
)
def test_rounding_rule(rounding: str, height_of_content: int) -> None:
    preprocessing = Preprocessing(resize_to=640, rounding=rounding, pad_value=7)
    canvas, _ = letterbox(np.full((662, 1000, 3), 200, dtype=np.uint8), preprocessing)
    assert (canvas == 200).all(axis=(1, 2)).sum() == height_of_content
    assert (canvas == 7).all(axis=(1, 2)).sum() == 640 - height_of_content


def test_bottom_right_padding_puts_the_image_at_the_origin() -> None:
    image = image_of(50, 64)
    canvas, placement = letterbox(image, Preprocessing(image_size=(64, 64), resize_to=64, pad="bottom_right"))
    np.testing.assert_array_equal(canvas[:50], image)
    assert (canvas[50:] == 114).all()
    assert (placement.left, placement.top, placement.scale) == (0, 0, 1.0)


def test_bgr_models_get_bgr() -> None:
    image = image_of(64, 64)
    rgb, _ = letterbox(image, Preprocessing.square(64))
    bgr, _ = letterbox(image, Preprocessing(image_size=(64, 64), resize_to=64, channels="bgr"))
    np.testing.assert_array_equal(rgb, image)
    np.testing.assert_array_equal(bgr, image[..., ::-1])


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, 1), (31, 33), (640, 640), (4000, 3000)])
@pytest.mark.parametrize("canvas_size", [(320, 320), (96, 640)])
def test_any_shape_fits(size: tuple[int, int], canvas_size: tuple[int, int]) -> None:
    preprocessing = Preprocessing(image_size=canvas_size, resize_to=max(canvas_size))
    canvas, placement = letterbox(np.zeros((*size, 3), dtype=np.uint8), preprocessing)
    assert canvas.shape == (*canvas_size, 3)
    height, width = size
    corners = placement.to_canvas([[0, 0, width, height]])[0]
    planes = np.full((3, *canvas_size), 99, dtype=np.uint8)
    assert letterbox_into(planes, np.zeros((*size, 3), dtype=np.uint8), preprocessing) == placement
    np.testing.assert_array_equal(planes, canvas.transpose(2, 0, 1))
    assert (corners[:2] >= -1).all()
    assert corners[2] <= canvas_size[1] + 1
    assert corners[3] <= canvas_size[0] + 1


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    side=st.integers(1, 40).map(lambda n: 32 * n),
    margin=st.integers(0, 4),
    pad=st.sampled_from(["center", "bottom_right"]),
    fractions=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_boxes_come_back(
    height: int, width: int, side: int, margin: int, pad: str, fractions: tuple[float, float, float, float]
) -> None:
    preprocessing = Preprocessing(image_size=(side, side), resize_to=side - margin, pad=pad)
    _, placement = letterbox(np.zeros((height, width, 3), dtype=np.uint8), preprocessing)
    boxes = np.array([fractions]) * [width, height, width, height]
    back = placement.to_image(placement.to_canvas(boxes))
    # float32 canvas coordinates carry 2^-24 of the canvas, which the way back enlarges by 1 / scale
    np.testing.assert_allclose(back, boxes, atol=1e-4 + side * 2**-23 / placement.scale)


def test_boxes_are_clipped_to_the_image() -> None:
    _, placement = letterbox(image_of(100, 200), Preprocessing.square(320))
    np.testing.assert_array_equal(placement.to_image([[-50, -50, 400, 400]]), [[0, 0, 200, 100]])
    assert placement.to_image(np.empty((0, 4))).shape == (0, 4)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize("pad", ["center", "bottom_right"])
@pytest.mark.parametrize("size", [(50, 64), (64, 64), (200, 90), (7, 31)])
def test_planes_are_the_canvas(size: tuple[int, int], pad: str, channels: str) -> None:
    preprocessing = Preprocessing(image_size=(64, 96), resize_to=90, pad=pad, channels=channels, pad_value=7)
    canvas, placement = letterbox(image_of(*size), preprocessing)
    planes = np.full((2, 3, 64, 96), 99, dtype=np.uint8)
    assert letterbox_into(planes[1], image_of(*size), preprocessing) == placement
    np.testing.assert_array_equal(planes[1], canvas.transpose(2, 0, 1))
    assert (planes[0] == 99).all()


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\] RGB, not (float64|uint8) \["):
        letterbox(image, Preprocessing())
