"""Tracks become Label Studio's video regions: keyframes, lifespans, percent."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from yolonas.inference.detections import Detections
from yolonas.labelstudio import Control, LabelMap
from yolonas.labelstudio_video import labelled_frames, to_video_rectangle

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


def track(*keyframes: tuple[int, float, bool], label: str = "Cat", **region: Any) -> dict[str, Any]:
    """As an annotation holds it: (frame, x, enabled) of a rectangle of 10 by 20 percent."""
    sequence = [
        {"frame": number, "enabled": enabled, "rotation": 0, "x": x, "y": 5, "width": 10, "height": 20, "time": 0}
        for number, x, enabled in keyframes
    ]
    value = {"framesCount": COUNT, "duration": 4, "sequence": sequence, "labels": [label]}
    return {"type": "videorectangle", "from_name": "box", "to_name": "video", "value": value, **region}


def test_each_keyframe_shows_all_that_is_there() -> None:
    one, two = track((1, 0, True), (11, 50, False), (21, 60, True)), track((6, 80, True), label="Dog")
    frames = labelled_frames([one, two], [CONTROL])
    shown = {
        number: [(region["value"]["rectanglelabels"][0], region["value"]["x"]) for region in regions]
        for number, regions in frames.items()
    }
    assert shown == {
        1: [("Cat", 0)],
        6: [("Cat", 25), ("Dog", 80)],  # interpolated, as the frame is no keyframe of it
        11: [("Cat", 50), ("Dog", 80)],  # the last frame before it is hidden
        21: [("Cat", 60), ("Dog", 80)],
    }
    assert {region["type"] for regions in frames.values() for region in regions} == {"rectanglelabels"}


def test_tracks_read_back_as_their_boxes() -> None:
    boxes = {index: (40 + 9 * index, 20 + index**2, 120 + 9 * index, 80 + index**2) for index in range(10)}
    frames = labelled_frames(convert([frame(index, {7: box}) for index, box in boxes.items()]), [CONTROL])
    assert frames[1]
    assert frames[10]
    for number, (region,) in frames.items():
        x1, y1, x2, y2 = boxes[number - 1]
        found = [region["value"][side] for side in ("x", "y", "width", "height")]
        assert found == pytest.approx([x1 / 4, y1 / 2, (x2 - x1) / 4, (y2 - y1) / 2])


def test_regions_of_others_and_broken_keyframes_are_left_out() -> None:
    good = track((3, 7, True))
    broken: list[Any] = [{"frame": 2}, {"frame": "x"}, None, {**good["value"]["sequence"][0], "x": float("nan")}]
    good["value"]["sequence"] += [*broken, {**good["value"]["sequence"][0], "frame": 0}]
    others = [track((5, 1, True), from_name="other"), track((6, 1, True), type="rectangle"), {"type": "videorectangle"}]
    assert list(labelled_frames([good, *others, {}], [CONTROL])) == [3]
