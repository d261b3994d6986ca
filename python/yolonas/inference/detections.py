"""The boxes found in one image: what every part of the program passes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import supervision

    from yolonas.inference.signals import ImageSignals


class Detection(NamedTuple):
    """One box: float32 [4] xyxy image px, its score and class, and the number of its track where it has one."""

    box: npt.NDArray[np.float32]
    score: float
    label: int
    name: str
    track_id: int | None = None


@dataclass(eq=False)
class Detections:
    """Boxes of one image, best first.

    boxes: float32 [n, 4] xyxy, pixels of the image after EXIF transposition, clipped to it; scores: float32 [n];
    labels: int64 [n], indices into `names`; image_size: (height, width). `image` is uint8 [h, w, 3] RGB where the
    pixels were kept; `path` is where they were read. Of a video, `frame` is the index of the frame, from 0, and `time`
    its time stamp in seconds. track_ids: int64 [n], the same number for the same object in other frames, where a
    `Tracker` gave them. signals: how sure the network was of each box, where it was asked (`predict_batch`). Raises
    ValueError where the arrays do not belong together.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]
    image_size: tuple[int, int]
    path: str | None = None
    image: npt.NDArray[np.uint8] | None = None
    frame: int | None = None
    time: float | None = None
    track_ids: npt.NDArray[np.int64] | None = None
    signals: ImageSignals | None = None

    def __post_init__(self) -> None:
        self.boxes = np.asarray(self.boxes, dtype=np.float32).reshape(-1, 4)
        self.scores = np.asarray(self.scores, dtype=np.float32).reshape(-1)
        self.labels = np.asarray(self.labels, dtype=np.int64).reshape(-1)
        self.names = tuple(self.names)
        if not len(self.boxes) == len(self.scores) == len(self.labels):
            sizes = f"{len(self.boxes)} boxes, {len(self.scores)} scores, {len(self.labels)} labels"
            raise ValueError(f"boxes, scores and labels must be equally many, not {sizes}")
        if self.track_ids is not None:
            self.track_ids = np.asarray(self.track_ids, dtype=np.int64).reshape(-1)
            if len(self.track_ids) != len(self.boxes):
                raise ValueError(f"track_ids must be as many as boxes, {len(self.boxes)}, not {len(self.track_ids)}")
        if self.signals is not None and len(self.signals) != len(self.boxes):
            raise ValueError(f"signals must be of as many boxes, {len(self.boxes)}, not {len(self.signals)}")
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.names):
            raise ValueError(f"labels must be 0 to {len(self.names) - 1}, not {np.unique(self.labels).tolist()}")

    def __len__(self) -> int:
        return len(self.boxes)

    def __iter__(self) -> Iterator[Detection]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | list[int] | npt.NDArray[Any]) -> Detections: ...
    def __getitem__(self, index: int | slice | list[int] | npt.NDArray[Any]) -> Detection | Detections:
        """One detection for an integer; a part of them for a slice, an index array or a boolean mask."""
        if isinstance(index, int | np.integer):
            label = int(self.labels[index])
            track_id = None if self.track_ids is None else int(self.track_ids[index])
            return Detection(self.boxes[index], float(self.scores[index]), label, self.names[label], track_id)
        rows: Any = index  # mypy knows no list as an index of an array
        track_ids = None if self.track_ids is None else self.track_ids[rows]
        parts = {"boxes": self.boxes[rows], "scores": self.scores[rows], "labels": self.labels[rows]}
        signals = None if self.signals is None else self.signals[rows]
        return dataclasses.replace(self, **parts, track_ids=track_ids, signals=signals)

    def __repr__(self) -> str:
        height, width = self.image_size
        place = f", {self.path}" if self.path else ""
        frame = "" if self.frame is None else f", frame {self.frame}"
        return f"Detections({len(self)} boxes, {width}x{height}{place}{frame})"

    def plot(self) -> npt.NDArray[np.uint8]:
        """The image with the boxes drawn, uint8 [h, w, 3] RGB; it is read again where its pixels were not kept.

        Boxes with a track have the track's colour and number. Raises ValueError where there are neither pixels nor a
        path, DataError where the file has become unreadable.
        """
        from yolonas.inference.visualize import draw

        return draw(self.image if self.image is not None else self._read_again(), self)

    def _read_again(self) -> npt.NDArray[np.uint8]:
        from yolonas.inference.sources import read_image
        from yolonas.inference.video import read_frame

        if self.path is None:
            raise ValueError("these detections carry neither the image nor its path: set .image to draw on it")
        return read_image(self.path) if self.frame is None else read_frame(self.path, self.frame)

    def save(self, path: str | Path) -> Path:
        """Write the image with the boxes drawn; the suffix of the path chooses the format, such as .jpg or .png."""
        from yolonas.inference.sources import write_image

        return write_image(path, self.plot())

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, ready for JSON: boxes in image px, scores, class numbers and names.

        Frames of a video add `frame` and `time`, tracks add `track_id` to each box.
        """
        height, width = self.image_size
        found: list[dict[str, Any]] = [
            {"box": [round(v, 3) for v in d.box.tolist()], "score": round(d.score, 6), "label": d.label, "name": d.name}
            for d in self
        ]
        if self.track_ids is not None:
            for entry, track_id in zip(found, self.track_ids.tolist(), strict=True):
                entry["track_id"] = track_id
        place: dict[str, Any] = {"path": self.path}
        if self.frame is not None:
            place |= {"frame": self.frame, "time": None if self.time is None else round(self.time, 6)}
        return {**place, "width": width, "height": height, "detections": found}

    def to_supervision(self) -> supervision.Detections:
        """As `supervision.Detections`: class names in `data["class_name"]`, tracks in `tracker_id`.

        Needs the package supervision.
        """
        import supervision

        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            tracker_id=None if self.track_ids is None else self.track_ids.copy(),
            data={"class_name": np.array([self.names[label] for label in self.labels], dtype=str)},
        )
