"""Boxes stay on their objects through every augmentation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolonas.data.augment import Augmentation, Labelled, mosaic, single, transform_boxes, vary_colours

PAD = 114
PLAIN = Augmentation(flip=0, hue=0, saturation=0, value=0, translate=0, scale=(1, 1), mosaic=0)


def rectangle(height: int, width: int, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> Labelled:
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = colour
    return Labelled(image, np.array([box], dtype=np.float32), np.array([0], dtype=np.int64))


def coloured_bounds(image: np.ndarray, colour: tuple[int, int, int]) -> list[float]:
    """Bounds of the coloured object; a pixel half covered counts to half, so edges are found between pixels."""
    channel = int(np.argmax(colour))
    others = [c for c in range(3) if c != channel]
    cover = (image[..., channel].astype(float) - image[..., others].max(axis=-1)).clip(0) / 255
    rows, columns = cover.max(axis=1), cover.max(axis=0)

    def edges(profile: np.ndarray) -> tuple[float, float]:
        inside = np.flatnonzero(profile > 0.05)
        return inside[0] + 1 - profile[inside[0]], inside[-1] + profile[inside[-1]]

    (x1, x2), (y1, y2) = edges(columns), edges(rows)
    return [x1, y1, x2, y2]


boxes = st.tuples(st.integers(0, 60), st.integers(0, 50), st.integers(20, 60), st.integers(20, 45)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), box=boxes, degrees=st.sampled_from([0.0, 0.0, 90.0]))
def test_single_view_keeps_the_box_on_its_object(seed: int, box: tuple[int, int, int, int], degrees: float) -> None:
    augmentation = Augmentation(hue=0, saturation=0, value=0, translate=0.3, degrees=degrees, min_visible=0.5)
    sample = rectangle(100, 128, box, (255, 0, 0))
    view = single(np.random.default_rng(seed), sample, (128, 160), augmentation, PAD)
    assert view.image.shape == (128, 160, 3)
    if len(view.boxes):
        # A turned rectangle that is cut at the border keeps the cut bounds of its enclosing box, not of itself.
        cut = (view.boxes[0] <= 0) | (view.boxes[0] >= (160, 128, 160, 128))
        if degrees == 0 or not cut.any():
            # At an arbitrary angle bilinear interpolation shaves the corners that define the bounds.
            np.testing.assert_allclose(
                view.boxes[0], coloured_bounds(view.image, (255, 0, 0)), atol=1.0 if degrees == 0 else 2.5
            )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), box=boxes)
def test_mosaic_keeps_each_box_on_its_object(seed: int, box: tuple[int, int, int, int]) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    samples = [rectangle(100, 128, box, colour)._replace(labels=np.array([k])) for k, colour in enumerate(colours)]
    samples.append(Labelled(np.zeros((90, 70, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)))
    augmentation = Augmentation(hue=0, saturation=0, value=0, min_visible=0.3)
    view = mosaic(np.random.default_rng(seed), samples, (128, 160), augmentation, PAD)
    for found, label in zip(view.boxes, view.labels, strict=True):
        np.testing.assert_allclose(found, coloured_bounds(view.image, colours[label]), atol=1.0)


def test_identity_changes_no_pixel_and_no_box() -> None:
    sample = rectangle(96, 128, (10, 20, 50, 60), (255, 0, 0))
    view = single(np.random.default_rng(0), sample, (96, 128), PLAIN, PAD)
    assert np.array_equal(view.image, sample.image)
    assert np.array_equal(view.boxes, sample.boxes)


def test_flip_mirrors_pixels_and_boxes() -> None:
    sample = rectangle(96, 128, (10, 20, 50, 60), (255, 0, 0))
    view = single(np.random.default_rng(0), sample, (96, 128), Augmentation(**{**vars(PLAIN), "flip": 1.0}), PAD)
    assert np.array_equal(view.image, sample.image[:, ::-1])
    assert view.boxes.tolist() == [[78, 20, 118, 60]]


def test_outside_is_padded() -> None:
    view = single(np.random.default_rng(0), rectangle(32, 32, (0, 0, 32, 32), (255, 0, 0)), (96, 96), PLAIN, PAD)
    assert (view.image[:30] == PAD).all()
    assert view.boxes.tolist() == [[32, 32, 64, 64]]


def test_mostly_hidden_boxes_are_dropped() -> None:
    sample = Labelled(
        np.zeros((64, 64, 3), np.uint8),
        np.array([[-30, 0, 2, 20], [10, 10, 30, 30], [5, 5, 6, 40]], np.float32),
        np.arange(3),
    )
    view = single(np.random.default_rng(0), sample, (64, 64), PLAIN, PAD)
    assert view.labels.tolist() == [1]


def test_same_generator_same_view() -> None:
    sample = rectangle(100, 128, (10, 20, 50, 60), (200, 30, 90))
    first, second = (mosaic(np.random.default_rng(3), [sample] * 4, (96, 96), Augmentation(), PAD) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.boxes, second.boxes)


def test_colours_vary_within_their_limits_and_grey_stays_grey() -> None:
    grey = np.full((4, 4, 3), 100, dtype=np.uint8)
    found = set()
    for seed in range(20):
        varied = vary_colours(np.random.default_rng(seed), grey, Augmentation(value=0.25)).astype(int)
        assert (varied == varied[0, 0, 0]).all()
        assert 74 <= varied[0, 0, 0] <= 125
        found.add(int(varied[0, 0, 0]))
    assert len(found) > 5
    assert vary_colours(np.random.default_rng(0), grey, PLAIN) is grey


def test_transform_encloses_a_turned_box() -> None:
    quarter = np.array([[0.0, -1.0, 10.0], [1.0, 0.0, 0.0]])
    assert transform_boxes(np.array([[1, 2, 5, 4]], np.float32), quarter).tolist() == [[6, 1, 8, 5]]
    assert transform_boxes(np.zeros((0, 4), np.float32), quarter).shape == (0, 4)


def test_mosaic_wants_four_images() -> None:
    with pytest.raises(ValueError, match="4 images, not 1"):
        mosaic(np.random.default_rng(0), [rectangle(32, 32, (0, 0, 9, 9), (1, 2, 3))], (64, 64), PLAIN, PAD)
