"""Boxes stay on their objects through every augmentation."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolonas.data.augment import Augmentation, Labelled, mixup, mosaic, single, transform_boxes, vary_colours

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


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), box=boxes)
def test_mosaic_keeps_each_box_on_its_object(seed: int, box: tuple[int, int, int, int]) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    samples = [rectangle(100, 128, box, colour)._replace(labels=np.array([k])) for k, colour in enumerate(colours)]
    samples.append(Labelled(np.zeros((90, 70, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)))
    rng = np.random.default_rng(seed)
    augmentation = Augmentation(colours=0, min_visible=0.3)
    joined = mosaic(rng, samples, (128, 160), PAD)
    assert joined.image.shape == (256, 320, 3)
    view = single(rng, joined, (128, 160), augmentation, PAD)
    for found, label in zip(view.boxes, view.labels, strict=True):
        np.testing.assert_allclose(found, coloured_bounds(view.image, colours[label]), atol=1.0)


def test_a_mosaic_shows_four_whole_images_around_its_point() -> None:
    greys = [
        Labelled(np.full((20, 30, 3), 10 * k, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0))
        for k in (1, 2, 3, 4)
    ]
    joined = mosaic(np.random.default_rng(0), greys, (64, 64), PAD).image[..., 0]
    rows, columns = np.nonzero(joined != PAD)
    assert (joined != PAD).sum() == 4 * 20 * 30
    assert joined[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1][::20, ::30].tolist() == [
        [10, 20],
        [30, 40],
    ]
    assert (rows.max() + 1 - rows.min(), columns.max() + 1 - columns.min()) == (40, 60)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), first=boxes, second=boxes)
def test_mixup_keeps_the_boxes_of_both_on_their_objects(
    seed: int, first: tuple[int, int, int, int], second: tuple[int, int, int, int]
) -> None:
    rng = np.random.default_rng(seed)
    augmentation = Augmentation(colours=0, min_visible=0.5)
    view = single(rng, rectangle(100, 128, first, (255, 0, 0)), (128, 160), augmentation, 0)
    other = rectangle(100, 128, second, (0, 0, 255))._replace(labels=np.array([1]))
    both = mixup(rng, view, other, augmentation, 0)
    assert both.image.shape == (128, 160, 3)
    for found, label in zip(both.boxes, both.labels, strict=True):
        alone = np.zeros_like(both.image)
        alone[..., 2 * label] = 2 * (both.image[..., 2 * label] // 2).clip(0, 127)
        np.testing.assert_allclose(found, coloured_bounds(alone, ((255, 0, 0), (0, 0, 255))[label]), atol=1.0)
    assert (both.labels == 0).sum() == len(view.labels)
    assert both.image.max() <= 128


@pytest.mark.parametrize("flip", [0, 1])
def test_a_larger_second_image_covers_the_view(flip: int) -> None:
    black, white = (rectangle(32, 64, (0, 0, 64, 32), colour) for colour in ((0, 0, 0), (200, 200, 200)))
    for seed in range(10):
        augmentation = Augmentation(flip=flip, mixup_scale=(1.1, 1.5), min_visible=0)
        both = mixup(np.random.default_rng(seed), black, white, augmentation, PAD)
        assert (both.image == 100).all()
        assert both.boxes[1].tolist() == [0, 0, 64, 32]


def test_mixup_blends_half_and_half() -> None:
    bright, dark = (
        rectangle(32, 64, (0, 0, 64, 32), (200, 200, 200)),
        rectangle(32, 64, (0, 0, 32, 32), (100, 100, 100)),
    )
    augmentation = Augmentation(flip=0, mixup_scale=(0.5, 0.5))
    both = mixup(np.random.default_rng(0), bright, dark, augmentation, 60)
    assert both.image[4, 4, 0] == 150, "half of either"
    assert both.image[4, 24, 0] == 100, "the other image's black"
    assert both.image[20, 4, 0] == both.image[4, 50, 0] == 100, "black beside the smaller canvas"
    assert both.boxes.tolist() == [[0, 0, 64, 32], [0, 0, 16, 16]]
    mirrored = mixup(np.random.default_rng(0), bright, dark, Augmentation(flip=1, mixup_scale=(1, 1)), 60)
    assert mirrored.boxes[1].tolist() == [32, 0, 64, 32]
    tall = Labelled(np.zeros((64, 64, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert (
        mixup(np.random.default_rng(0), tall, dark, Augmentation(flip=0, mixup_scale=(1, 1)), 60).image[40, 4, 0] == 30
    )


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


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, [0, 1, 2]), ({"min_side": 4}, [0, 1]), ({"max_aspect": 20}, [0, 2]), ({"min_visible": 0.8}, [1, 2])],
)
def test_boxes_are_filtered_by_side_shape_and_share_in_view(changes: dict[str, float], kept: list[int]) -> None:
    sample = Labelled(
        np.zeros((200, 200, 3), np.uint8),
        np.array([[-20, 0, 40, 40], [0, 0, 200, 5], [50, 50, 53, 58], [199.5, 9, 200, 10]], np.float32),
        np.arange(4),
    )
    augmentation = Augmentation(**{**vars(PLAIN), "min_visible": 0, "min_side": 0, **changes})
    assert single(np.random.default_rng(0), sample, (200, 200), augmentation, PAD).labels.tolist() == kept


def test_same_generator_same_view() -> None:
    sample = rectangle(100, 128, (10, 20, 50, 60), (200, 30, 90))
    views = []
    for _ in range(2):
        rng, augmentation = np.random.default_rng(3), Augmentation(swap=0.5)
        view = single(rng, mosaic(rng, [sample] * 4, (96, 96), PAD), (96, 96), augmentation, PAD)
        views.append(mixup(rng, view, sample, augmentation, PAD))
    first, second = views
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


def hsv(image: np.ndarray) -> list[int]:
    return cv2.cvtColor(image, cv2.COLOR_RGB2HSV)[0, 0].astype(int).tolist()


def test_added_colours_change_each_channel_every_other_time_within_its_limit() -> None:
    first = cv2.cvtColor(np.full((4, 4, 3), (60, 150, 150), np.uint8), cv2.COLOR_HSV2RGB)
    augmentation = Augmentation(colours=1.0, added=True, hue=18, saturation=30, value=30)
    changes = np.array(
        [
            np.subtract(hsv(vary_colours(np.random.default_rng(seed), first, augmentation)), hsv(first))
            for seed in range(400)
        ]
    )
    assert (np.abs(changes).max(axis=0) <= np.array([18, 30, 30]) + 2).all(), "2 for the rounding of RGB"
    assert (np.abs(changes).max(axis=0) >= np.array([14, 26, 26])).all()
    unchanged = (np.abs(changes) <= 1).mean(axis=0)
    assert ((unchanged > 0.45) & (unchanged < 0.65)).all(), "off every other time, and small changes now and then"


def test_colours_change_as_often_as_asked() -> None:
    image = np.full((4, 4, 3), (200, 120, 40), np.uint8)
    never, half, swapped = Augmentation(colours=0), Augmentation(colours=0.5), Augmentation(colours=0, swap=0.5)
    assert all(vary_colours(np.random.default_rng(seed), image, never) is image for seed in range(20))
    varied = [vary_colours(np.random.default_rng(seed), image, half) is not image for seed in range(200)]
    assert 80 < sum(varied) < 120
    exchanged = [vary_colours(np.random.default_rng(seed), image, swapped)[0, 0].tolist() for seed in range(200)]
    assert {tuple(colour) for colour in exchanged} == {(200, 120, 40), (40, 120, 200)}
    assert 80 < exchanged.count([40, 120, 200]) < 120


@pytest.mark.parametrize(
    ("field", "value"),
    [("mixup", 1.5), ("flip", -0.1), ("scale", (1.5, 0.5)), ("mixup_scale", (0.0, 1.0)), ("pad", 300)],
)
def test_numbers_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must"):
        Augmentation(**{field: value})  # type: ignore[arg-type]


def test_transform_encloses_a_turned_box() -> None:
    quarter = np.array([[0.0, -1.0, 10.0], [1.0, 0.0, 0.0]])
    assert transform_boxes(np.array([[1, 2, 5, 4]], np.float32), quarter).tolist() == [[6, 1, 8, 5]]
    assert transform_boxes(np.zeros((0, 4), np.float32), quarter).shape == (0, 4)


def test_mosaic_wants_four_images() -> None:
    with pytest.raises(ValueError, match="4 images, not 1"):
        mosaic(np.random.default_rng(0), [rectangle(32, 32, (0, 0, 9, 9), (1, 2, 3))], (64, 64), PAD)
