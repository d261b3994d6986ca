"""Pure conversion between tracks and Label Studio's video regions: no I/O, no torch.

A VideoRectangle is a list of keyframes between which Label Studio interpolates.
Source: https://labelstud.io/tags/videorectangle.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections
    from yolonas.labelstudio import Control, LabelMap

Array = npt.NDArray[np.float64]


def to_video_rectangle(
    frames: Iterable[Detections],
    control: Control,
    label_map: LabelMap,
    *,
    fps: float,
    frame_count: int,
    max_gap: int = 5,
    max_error: float = 1.0,
) -> list[dict[str, Any]]:
    """Label Studio regions, one for each track of a video whose class has a label, in the order of their start.

    frames: detections with `frame` and `track_ids`, in order. control: `from_name` is the VideoRectangle tag's name.
    fps, frame_count: of the video. A track that misses at most `max_gap` of the frames given is interpolated there; a
    longer gap hides it. Of the boxes only so many become keyframes, for people to correct, that interpolation is
    nowhere more than `max_error` image px off. Raises ValueError for frames without tracks, or out of order.
    """
    tracks: dict[int, list[tuple[int, int, Array, float]]] = {}  # number -> place, frame, percent box, score
    labels: dict[int, str] = {}
    size, previous = (1, 1), -1
    for place, detections in enumerate(frames):
        if detections.frame is None or detections.track_ids is None:
            raise ValueError(
                "to_video_rectangle needs the frames of a video with tracks: see Detector.stream and Tracker"
            )
        if detections.frame <= previous:
            raise ValueError(f"frame {detections.frame} comes after frame {previous}: frames must be in order")
        previous, size = detections.frame, detections.image_size
        percent = 100 / np.array([size[1], size[0]] * 2, np.float64)
        for box, score, label, number in zip(
            detections.boxes, detections.scores, detections.labels, detections.track_ids.tolist(), strict=True
        ):
            if (name := label_map.to_label.get(int(label))) is not None and np.isfinite(box).all():
                labels.setdefault(number, name)
                found = (place, detections.frame, (box * percent).clip(0, 100), float(score))
                tracks.setdefault(number, []).append(found)
    tolerance = max_error * 100 / np.array([size[1], size[0]] * 2, np.float64)
    regions = []
    for number, track in tracks.items():
        sequence = []
        for part in _unbroken(track, max_gap):
            shown = np.array([frame for _, frame, _, _ in part])
            boxes = np.stack([box for _, _, box, _ in part])
            for i in _keyframes(shown, boxes, tolerance):
                sequence.append(_keyframe(int(shown[i]), boxes[i], fps, enabled=i < len(part) - 1))
        regions.append(
            {
                "id": uuid.uuid4().hex[:10],
                "from_name": control.from_name,
                "to_name": control.to_name,
                "type": "videorectangle",
                "score": float(np.mean([score for *_, score in track])),
                "value": {
                    "framesCount": frame_count,
                    "duration": frame_count / fps,
                    "sequence": sequence,
                    "labels": [labels[number]],
                },
            }
        )
    return regions


def _unbroken(
    track: Sequence[tuple[int, int, Array, float]], max_gap: int
) -> list[list[tuple[int, int, Array, float]]]:
    """The parts of a track between its long gaps."""
    parts = [[track[0]]]
    for before, now in pairwise(track):
        if now[0] - before[0] > max_gap + 1:
            parts.append([])
        parts[-1].append(now)
    return parts


def _keyframes(frames: npt.NDArray[np.int64], boxes: Array, tolerance: Array) -> list[int]:
    """Rows of the boxes that suffice, first and last among them (D. Douglas and T. Peucker, 1973, over time)."""
    kept, spans = {0, len(frames) - 1}, [(0, len(frames) - 1)]
    while spans:
        first, last = spans.pop()
        if last - first < 2:
            continue
        part = ((frames[first : last + 1] - frames[first]) / (frames[last] - frames[first]))[:, None]
        off = np.abs(boxes[first] + part * (boxes[last] - boxes[first]) - boxes[first : last + 1])
        excess = (off - tolerance).max(axis=1)
        worst = first + int(np.argmax(excess))
        if excess.max() > 0 and first < worst < last:
            kept.add(worst)
            spans += [(first, worst), (worst, last)]
    return sorted(kept)


def _keyframe(frame: int, box: Array, fps: float, enabled: bool) -> dict[str, Any]:
    """Label Studio counts frames from 1; a keyframe that is not enabled is the last that shows the region."""
    x, y, right, bottom = (float(value) for value in box)
    return {
        "frame": frame + 1,
        "enabled": enabled,
        "rotation": 0,
        "x": x,
        "y": y,
        "width": right - x,
        "height": bottom - y,
        "time": (frame + 1) / fps,
    }


def labelled_frames(
    result: Sequence[Mapping[str, Any]], controls: Sequence[Control]
) -> dict[int, list[dict[str, Any]]]:
    """What one annotation's `result` shows in each frame that has a keyframe of these VideoRectangle controls.

    The frames are numbered as Label Studio does, from 1, in order. Each region is as of RectangleLabels on an image:
    of every track that is shown in the frame, where it has no keyframe there, the interpolated rectangle.
    """
    ours = {(control.from_name, control.to_name) for control in controls}
    tracks = []
    for region in result:
        value = region.get("value") if isinstance(region, Mapping) else None
        if not isinstance(value, Mapping) or region.get("type") != "videorectangle":
            continue
        name = (str(region.get("from_name")), str(region.get("to_name")))
        if name in ours and isinstance(value.get("sequence"), list):
            keyframes = [key for key in map(_numbers, value["sequence"]) if key is not None]
            tracks.append((name, sorted(keyframes, key=lambda key: key["frame"]), value.get("labels")))
    frames: dict[int, list[dict[str, Any]]] = {}
    for number in sorted({int(key["frame"]) for _, keyframes, _ in tracks for key in keyframes}):
        frames[number] = [
            {
                "from_name": from_name,
                "to_name": to_name,
                "type": "rectanglelabels",
                "value": {**shape, "rectanglelabels": labels},
            }
            for (from_name, to_name), keyframes, labels in tracks
            if (shape := _shown(keyframes, number)) is not None
        ]
    return frames


def _numbers(keyframe: Any) -> dict[str, float] | None:
    """The keyframe's frame, rectangle and `enabled`, 0 or 1; None where that is not all there."""
    try:
        found = {key: float(keyframe[key]) for key in ("frame", "x", "y", "width", "height")}
        found["rotation"] = float(keyframe.get("rotation") or 0.0)
        found["enabled"] = float(bool(keyframe.get("enabled", True)))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    return found if all(math.isfinite(number) for number in found.values()) and found["frame"] >= 1 else None


def _shown(keyframes: Sequence[dict[str, float]], number: int) -> dict[str, float] | None:
    """The rectangle that Label Studio draws in a frame, None where the region is hidden."""
    before = next((key for key in reversed(keyframes) if key["frame"] <= number), None)
    if before is None or not (before["enabled"] or before["frame"] == number):
        return None
    after = next((key for key in keyframes if key["frame"] > number), before)
    part = (number - before["frame"]) / max(after["frame"] - before["frame"], 1.0)
    sides = ("x", "y", "width", "height", "rotation")
    return {side: before[side] + part * (after[side] - before[side]) for side in sides}
