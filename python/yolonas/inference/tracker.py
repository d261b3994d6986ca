"""Identities over the frames of a video, by ByteTrack's method: Y. Zhang et al., ECCV 2022, arXiv 2110.06864."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from yolonas.inference.assignment import assign
from yolonas.inference.detections import Detections

Array = npt.NDArray[np.float64]

# Standard deviations as parts of a box's sides, those of DeepSORT (N. Wojke et al., 2017) and the paper's code.
_POSITION = 1 / 20
_VELOCITY = 1 / 160  # per frame


class Tracker:
    """Gives the boxes of one object the same number in every frame. Make one for each video.

    high: boxes that score more start tracks; low: those that score more than this continue them, so run the detector
    with conf=low. iou: the least overlap of a box with where its track is expected. max_lost: a track that was not seen
    for more frames of the video is forgotten. An object is one class: boxes continue tracks of their own class only.
    Raises ValueError for a number out of range.
    """

    def __init__(self, high: float = 0.25, low: float = 0.1, iou: float = 0.2, max_lost: int = 30) -> None:
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low and high must be scores, low the lesser, not {low} and {high}")
        if not 0 < iou < 1:
            raise ValueError(f"iou must lie between 0 and 1, not {iou}")
        if max_lost < 0:
            raise ValueError(f"max_lost must be at least 0 frames, not {max_lost}")
        self.high, self.low, self.iou, self.max_lost = high, low, iou, max_lost
        self._tracks = _Tracks.none()
        self._frame: int | None = None
        self._next_id = 1

    def update(self, detections: Detections) -> Detections:
        """The detections of the next frame that belong to a track, in their order, with `track_ids`.

        Where detections have a `frame`, frames that were left out count as time that passed. A track begins to show in
        its second frame, as one box alone is often an error; those of the first frame of all begin at once.
        """
        frame = self._next_frame(detections)
        first, elapsed = self._frame is None, frame - (frame if self._frame is None else self._frame)
        self._frame = frame
        tracks = self._tracks
        seen = tracks.last_seen == frame - elapsed
        tracks.predict(elapsed, ~seen)
        boxes = detections.boxes.astype(np.float64)
        track_of = np.full(len(detections), -1)  # row among the tracks
        high = detections.scores > self.high
        low = ~high & (detections.scores > self.low)

        def match(rows: npt.NDArray[np.bool_], columns: npt.NDArray[np.bool_], iou: float) -> None:
            """Pair those tracks and boxes that are still without a partner."""
            free = np.flatnonzero(rows & ~np.isin(np.arange(len(tracks)), track_of))
            loose = np.flatnonzero(columns & (track_of < 0))
            cost = 1 - _iou(tracks.boxes()[free], boxes[loose])
            cost[tracks.label[free, None] != detections.labels[loose]] = np.inf
            chosen, paired = assign(cost, 1 - iou)
            track_of[loose[paired]] = free[chosen]

        match(tracks.confirmed, high, self.iou)
        match(tracks.confirmed & seen, low, max(self.iou, 0.5))  # faint boxes are often of something else
        match(~tracks.confirmed, high, max(self.iou, 0.3))
        found = np.flatnonzero(track_of >= 0)
        ids = np.zeros(len(detections), np.int64)
        ids[found] = self._named(tracks.number[track_of[found]])
        tracks.number[track_of[found]] = ids[found]
        tracks.correct(track_of[found], boxes[found], frame)
        fresh = np.flatnonzero(high & (track_of < 0))
        if first:
            ids[fresh] = self._named(np.zeros(len(fresh), np.int64))
        alive = (tracks.last_seen == frame) | (tracks.confirmed & (frame - tracks.last_seen <= self.max_lost))
        begun = _Tracks.new(boxes[fresh], detections.labels[fresh], ids[fresh], frame)
        self._tracks = tracks[alive] + begun
        shown = ids > 0
        return dataclasses.replace(detections[shown], track_ids=ids[shown])

    def _named(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The numbers, and the next ones, from 1 on, where a track has 0: it has none before it is sure to be one."""
        nameless = np.flatnonzero(numbers == 0)
        numbers[nameless] = self._next_id + np.arange(len(nameless))
        self._next_id += len(nameless)
        return numbers

    def _next_frame(self, detections: Detections) -> int:
        if detections.frame is None:
            return 0 if self._frame is None else self._frame + 1
        if self._frame is not None and detections.frame <= self._frame:
            raise ValueError(
                f"frame {detections.frame} comes after frame {self._frame}: a tracker takes one video in order"
            )
        return detections.frame


@dataclasses.dataclass
class _Tracks:
    """All tracks, one per row: where each box is, and its motion.

    A Kalman filter of constant velocity for each of centre x, centre y, width, height. With noise that is independent
    between these four, as in the paper's code, it is four filters of two numbers each, whose algebra needs no matrices.
    """

    position: Array  # [n, 4] cx, cy, w, h, image px
    velocity: Array  # [n, 4] px per frame
    variance: Array  # [n, 3, 4]: of position, of both, of velocity
    label: npt.NDArray[np.int64]
    number: npt.NDArray[np.int64]  # 0 until confirmed
    last_seen: npt.NDArray[np.int64]  # frame

    @classmethod
    def none(cls) -> _Tracks:
        return cls.new(np.empty((0, 4)), np.empty(0, np.int64), np.empty(0, np.int64), 0)

    @classmethod
    def new(cls, boxes: Array, labels: npt.NDArray[np.int64], numbers: npt.NDArray[np.int64], frame: int) -> _Tracks:
        position = _centres(boxes)
        scale = _scale(position)
        variance = np.stack([(2 * _POSITION * scale) ** 2, 0 * scale, (10 * _VELOCITY * scale) ** 2], axis=1)
        return cls(position, 0 * position, variance, labels, numbers, np.full(len(boxes), frame))

    @property
    def confirmed(self) -> npt.NDArray[np.bool_]:
        return self.number > 0

    def __len__(self) -> int:
        return len(self.number)

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> _Tracks:
        return _Tracks(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))

    def __add__(self, other: _Tracks) -> _Tracks:
        names = [field.name for field in dataclasses.fields(self)]
        return _Tracks(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))

    def boxes(self) -> Array:
        """[n, 4] xyxy image px."""
        half = self.position[:, 2:] / 2
        return np.concatenate([self.position[:, :2] - half, self.position[:, :2] + half], axis=1)

    def predict(self, frames: int, lost: npt.NDArray[np.bool_]) -> None:
        """Move on by a number of frames; what is lost keeps its size, which would else shrink or grow without end."""
        steps, scale = float(frames), _scale(self.position)
        self.velocity[lost, 2:] = 0
        self.position += steps * self.velocity
        self.position[:, 2:] = self.position[:, 2:].clip(1.0)
        own, both, speed = self.variance.swapaxes(0, 1)
        own = own + 2 * steps * both + steps**2 * speed + steps * (_POSITION * scale) ** 2
        self.variance = np.stack([own, both + steps * speed, speed + steps * (_VELOCITY * scale) ** 2], axis=1)

    def correct(self, rows: npt.NDArray[np.int64], boxes: Array, frame: int) -> None:
        """Take in the boxes that were found for these rows."""
        own, both, speed = self.variance[rows].swapaxes(0, 1)
        total = own + (_POSITION * _scale(self.position[rows])) ** 2
        gain, speed_gain = own / total, both / total
        error = _centres(boxes) - self.position[rows]
        self.position[rows] += gain * error
        self.velocity[rows] += speed_gain * error
        self.variance[rows] = np.stack([own - gain * own, both - gain * both, speed - speed_gain * both], axis=1)
        self.last_seen[rows] = frame


def _centres(boxes: Array) -> Array:
    """xyxy -> cx, cy, w, h."""
    return np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)


def _scale(position: Array) -> Array:
    """What noise is measured by: the width for x and width, the height for y and height; at least 1 px."""
    return np.maximum(np.tile(position[:, 2:], 2), 1.0)


def _iou(a: Array, b: Array) -> Array:
    """[n, m] overlap of boxes [n, 4] and [m, 4], xyxy."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    together = areas[0][:, None] + areas[1] - both
    overlap: Array = np.divide(both, together, out=np.zeros_like(both), where=together > 0)
    return overlap
