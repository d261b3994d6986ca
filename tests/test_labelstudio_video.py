"""Tracks become Label Studio's video regions: keyframes, lifespans, percent."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from yolonas.inference.detections import Detections
from yolonas.labelstudio import Control, LabelMap
from yolonas.labelstudio_video import to_video_rectangle

CONTROL = Control(from_name="box", to_name="video", data_key="video", labels=("Cat", "Dog"))
LABELS = LabelMap({0: "Cat", 1: "Dog"}, ())
FPS, COUNT, SIZE = 25.0, 100, (200, 400)  # height, width


def frame(index: int, boxes: dict[int, tuple[float, ...]], label: int = 0) -> Detections:
    found = np.array(list(boxes.values())).reshape(-1, 4)
    scores, labels = np.full(len(found), 0.8), np.full(len(found), label)
    return Detections(found, scores, labels, ("cat", "dog", "cow"), SIZE, frame=index, track_ids=list(boxes))


def convert(frames: list[Detections], **options: Any) -> list[dict[str, Any]]:
    regions = to_video_rectangle(frames, CONTROL, LABELS, fps=FPS, frame_count=COUNT, **options)
    return json.loads(json.dumps(regions))


def interpolated(sequence: list[dict[str, Any]], number: int) -> list[float] | None:
    """What Label Studio shows in a frame, from 1; None where the region is hidden."""
    keys = ("x", "y", "width", "height")
    before = [k for k in sequence if k["frame"] <= number]
    after = [k for k in sequence if k["frame"] > number]
    if not before or (not before[-1]["enabled"] and before[-1]["frame"] != number):
        return None
    start = before[-1]
    if not after:
        return [start[key] for key in keys]
    part = (number - start["frame"]) / (after[0]["frame"] - start["frame"])
    return [start[key] + part * (after[0][key] - start[key]) for key in keys]


def test_a_region_for_each_track_in_percent() -> None:
    (one, two) = convert([frame(t, {7: (40 + 4 * t, 20, 80 + 4 * t, 60), 9: (200, 100, 400, 200)}) for t in range(10)])
    assert {key: one[key] for key in ("from_name", "to_name", "type")} == {
        "from_name": "box",
        "to_name": "video",
        "type": "videorectangle",
    }
    assert one["score"] == pytest.approx(0.8)
    assert one["id"] != two["id"]
    assert (one["value"]["framesCount"], one["value"]["duration"], one["value"]["labels"]) == (100, 4.0, ["Cat"])
    first, last = one["value"]["sequence"]
    assert first == pytest.approx(
        {"frame": 1, "enabled": True, "rotation": 0, "x": 10, "y": 10, "width": 10, "height": 20, "time": 0.04}
    )
    assert (last["frame"], last["enabled"], last["time"]) == (10, False, pytest.approx(0.4))
    assert last["x"] == pytest.approx(19)
    assert [two["value"]["sequence"][0][key] for key in ("x", "y", "width", "height")] == [50, 50, 50, 50]


@pytest.mark.parametrize("stride", [1, 3])
def test_keyframes_are_few_and_close(stride: int) -> None:
    def box(t: int) -> tuple[float, ...]:
        x = 100 + 80 * np.sin(t / 30)
        return x, 50, x + 40 + t / 5, 100

    frames = [frame(t, {1: box(t)}) for t in range(0, 90, stride)]
    (region,) = convert(frames, max_error=1.0)
    sequence = region["value"]["sequence"]
    assert len(sequence) < 15, "of 90 frames" if stride == 1 else "of 30"
    for t in range(0, 90, stride):
        x, y, width, height = interpolated(sequence, t + 1) or ()
        found = [x * 4, y * 2, (x + width) * 4, (y + height) * 2]
        assert found == pytest.approx(box(t), abs=1.001)
    (exact,) = convert(frames, max_error=0.0)
    assert len(exact["value"]["sequence"]) > 0.9 * len(frames)


@pytest.mark.parametrize(("missing", "hidden"), [(5, False), (6, True)])
def test_a_long_gap_hides_the_region_and_a_short_one_does_not(missing: int, hidden: bool) -> None:
    gap = range(10, 10 + missing)
    frames = [frame(t, {} if t in gap else {1: (10, 10, 50, 50)}) for t in range(30)]
    (region,) = convert(frames, max_gap=5)
    shown = [interpolated(region["value"]["sequence"], t + 1) is not None for t in range(40)]
    assert shown == [t < 30 and not (hidden and t in gap) for t in range(40)]


def test_a_track_of_one_frame_and_classes_without_a_label() -> None:
    (region,) = convert([frame(4, {3: (10, 10, 50, 50)}, label=1), frame(5, {5: (10, 10, 50, 50)}, label=2)])
    assert region["value"]["labels"] == ["Dog"]
    (only,) = region["value"]["sequence"]
    assert (only["frame"], only["enabled"]) == (5, False)
    assert convert([]) == []


def test_what_is_no_tracked_video_is_refused() -> None:
    plain = frame(0, {1: (10, 10, 50, 50)})
    plain.track_ids = None
    with pytest.raises(ValueError, match="needs the frames of a video with tracks"):
        convert([plain])
    with pytest.raises(ValueError, match="frame 3 comes after frame 3: frames must be in order"):
        convert([frame(3, {}), frame(3, {})])
