"""Videos of tasks: a few frames of each second through the model, and what was found as tracks.

A video may take longer than Label Studio waits for an answer. So what was found is kept in a file as far as the time
reached, and the next request for the same video goes on from there. The video stays open until then: to decode it again
up to there may take longer than a request has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from labelstudio_backend.media import MediaError
from labelstudio_backend.scheduler import Level
from labelstudio_backend.settings import Settings
from labelstudio_backend.turns import Turns
from yolonas.atomic import atomic_file
from yolonas.errors import DataError, YolonasError
from yolonas.inference.detections import Detections
from yolonas.inference.video import Frame, Video
from yolonas.labelstudio import Control, LabelMap
from yolonas.labelstudio_video import to_video_rectangle

logger = logging.getLogger(__name__)

LOW = 0.1  # boxes down to this score continue a track, as in ByteTrack
LOST_SECONDS = 1.2  # a track that was not seen for longer is forgotten: 30 frames of the usual 25 a second
AT_ONCE = 8  # frames in memory
KEPT = 500  # videos whose findings are kept, the most recently used
FETCHES = 2  # at a time, each in memory
OPEN = 2  # unfinished videos that stay open: one of a batch action, and one that somebody has opened
LEFT_SECONDS = 900.0  # an open one that was not asked for so long gives way

Detect = Callable[[list[Frame]], Sequence[Detections | str | None]]


class NotReachedError(YolonasError):
    """A video that was not looked at to its end in time; the next request goes on."""


@dataclass
class Looked:
    """What was found in a video so far: its frames in order, and whether they are all.

    fps and count are those that the file declares; a count of 0 is not known.
    """

    fps: float
    count: int
    frames: list[Detections] = field(default_factory=list)  # with index and time
    done: bool = False

    @property
    def seconds(self) -> float:
        """How long the video is."""
        return max(self.count, self.next) / self.fps

    @property
    def next(self) -> int:
        """Index of the first frame of the video that was not considered yet."""
        frame = self.frames[-1].frame if self.frames else None
        return 0 if frame is None else frame + 1

    def save(self, path: Path) -> None:
        """Replace the file, atomically."""
        frames = self.frames
        arrays: dict[str, Any] = {
            "done": np.array(self.done),
            "frame": np.array([f.frame for f in frames], np.int64),
            "time": np.array([f.time for f in frames], np.float64),
            "size": np.array(frames[0].image_size if frames else (0, 0), np.int64),
            "count": np.array([len(f) for f in frames], np.int64),
            "boxes": np.concatenate([np.empty((0, 4), np.float32), *(f.boxes for f in frames)]),
            "scores": np.concatenate([np.empty(0, np.float32), *(f.scores for f in frames)]),
            "labels": np.concatenate([np.empty(0, np.int64), *(f.labels for f in frames)]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as stream:
            np.savez_compressed(stream, **arrays)

    def load(self, path: Path, names: Sequence[str]) -> None:
        """Take in what `save` wrote, where that is more; nothing where there is no such file, or it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                height, width = (int(side) for side in stored["size"])
                ends = np.cumsum(stored["count"])[:-1]
                parts = (np.split(stored[key], ends) for key in ("boxes", "scores", "labels"))
                frames = [
                    Detections(boxes, scores, labels, tuple(names), (height, width), frame=int(index), time=float(at))
                    for boxes, scores, labels, index, at in zip(*parts, stored["frame"], stored["time"], strict=True)
                ]
                if len(frames) > len(self.frames) or stored["done"]:
                    self.frames, self.done = frames, bool(stored["done"])
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever a file that was cut makes zipfile and NumPy raise
            logger.warning("%s is damaged, so its video is looked at anew: %s", path, error)


class _Reading:
    """A video that is open: it is read on from where it was left, whoever asks for it then."""

    def __init__(self, video: Video, stride: int) -> None:
        self.first = 0  # all frames from this one on are still to be had
        self._steps = video.steps(lambda index: index >= self.first and index % stride == 0)
        self._ahead: list[Frame] = []  # read, and not asked for again yet

    def batch(self, first: int, stop: Callable[[], bool]) -> list[Frame] | None:
        """The next frames from `first` on, AT_ONCE or what is left; None where it has to stop before it has them.

        What was read by then is not read again. A video that breaks off ends where it does. Raises MediaError for one
        without a frame.
        """
        self.first = first
        self._ahead = [frame for frame in self._ahead if frame.index >= first]
        while len(self._ahead) < AT_ONCE:
            try:
                step = next(self._steps)
            except StopIteration:
                break
            if isinstance(step, DataError):
                if first == 0 and not self._ahead:
                    raise MediaError("its video cannot be read; upload it again, as MP4 (H.264) or WebM")
                logger.warning("%s", step)
            elif step is not None:
                self._ahead.append(step)
            if stop():
                return None
        return self._ahead


class Videos:
    """Looks at one video at a time, and keeps what it found in `<state_dir>/videos`."""

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.state_dir / "videos"
        self._settings = settings
        self._turns = Turns()
        self._fetches = ThreadPoolExecutor(FETCHES, "video")
        self._fetching: dict[tuple[str, str], Future[Path]] = {}
        self._guard = threading.Lock()  # of _fetching
        # By the file of findings, the last used last, with the time of that.
        self._unfinished: dict[Path, tuple[_Reading, float]] = {}

    def close(self) -> None:
        """Begin no further download."""
        self._fetches.shutdown(wait=False, cancel_futures=True)

    def file(self, key: tuple[str, str], fetch: Callable[[], Path], deadline: float, gone: Future[None]) -> Path:
        """The file of a video, as `fetch` has it, which goes on when the time is over: then the next request has it.

        key: project and value. Raises NotReachedError when the time is over or `gone` is done, and what `fetch` raises.
        """
        with self._guard:
            if (coming := self._fetching.get(key)) is None:
                coming = self._fetching[key] = self._fetches.submit(fetch)
                coming.add_done_callback(lambda _: self._fetching.pop(key, None))
        either: tuple[Future[Any], ...] = (coming, gone)
        wait(either, deadline - time.monotonic(), FIRST_COMPLETED)
        if not coming.done():
            raise NotReachedError("its video is still being fetched; asked again, it may be there")
        return coming.result()

    def look(
        self,
        file: Path,
        model: str,
        names: Sequence[str],
        detect: Detect,
        deadline: float,
        *,
        level: int = 0,
        gone: Future[None] | None = None,
    ) -> Looked:
        """What there is in a whole video, as far as some frames of each second tell.

        file: the video; model: names what `detect` gives, and so what was found before; names: the model's classes;
        detect: detections of a batch of frames, reasons why there are none, or None for what was not reached;
        deadline: of time.monotonic(); level: the lowest goes first, and has the others pause; gone: done once nobody
        waits any more. Raises NotReachedError when the time is over, MediaError for a file that is no video or a frame
        that failed.
        """
        leaving: Future[None] = gone or Future()
        video = checked(file)
        looked = Looked(video.frame_rate(), video.frame_count() or 0)
        stride = max(1, round(looked.fps / self._settings.video_rate))
        identity = f"{file} {file.stat().st_size} {model} {stride} {self._settings.iou}"
        kept = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
        looked.load(kept, names)
        place, more = self._turns.place(level), True

        def over(seconds: float = 0.0) -> bool:
            """Whether nobody waits any more for what takes so long."""
            return leaving.done() or time.monotonic() + seconds > deadline

        def urgent() -> bool:
            return self._turns.urgent(level)

        while more and not looked.done:
            if not self._turns.take(place, deadline, leaving):
                raise NotReachedError("its video waits for another one; asked again, it has its turn")
            try:
                looked.load(kept, names)  # the turn before may have been for the same video
                more = looked.done or self._read_on(video, looked, kept, stride, detect, over, urgent, level)
            finally:
                self._turns.release()
        if not looked.done:
            raise NotReachedError(
                f"its video was looked at up to frame {looked.next} of {looked.count or 'an unknown number'} in "
                f"{self._settings.predict_seconds:g} s (YOLONAS_PREDICT_SECONDS); asked again, it goes on from there"
            )
        return looked

    def _read_on(
        self,
        video: Video,
        looked: Looked,
        kept: Path,
        stride: int,
        detect: Detect,
        over: Callable[..., bool],
        urgent: Callable[[], bool],
        level: int,
    ) -> bool:
        """Use a turn; whether it ended because somebody more urgent waits for one."""
        before, (reading, _) = looked.next, self._unfinished.pop(kept, (None, 0.0))
        if reading is None or reading.first > before:
            reading = _Reading(video, stride)
        try:
            gives_way = _go_on(reading, looked, detect, over, urgent)
        finally:
            if looked.done or looked.next > before:
                self._keep(looked, kept)
        if not looked.done:
            now, oldest = time.monotonic(), next(iter(self._unfinished), kept)
            self._unfinished[kept] = reading, now
            if len(self._unfinished) > OPEN:
                # Of many videos that are asked for in turns, two are looked at to their ends before others stay open.
                others = level >= Level.MANY and now - self._unfinished[oldest][1] < LEFT_SECONDS
                del self._unfinished[kept if others else oldest]
        return gives_way

    def _keep(self, looked: Looked, path: Path) -> None:
        try:
            looked.save(path)
            files = sorted(self.folder.glob("*.npz"), key=lambda file: file.stat().st_mtime, reverse=True)
            for file in files[KEPT:]:
                file.unlink(missing_ok=True)
        except OSError as error:  # a full disk: the answer itself needs no file
            logger.warning("what was found in a video could not be kept in %s: %s", path, error.strerror or error)


def _go_on(
    reading: _Reading, looked: Looked, detect: Detect, over: Callable[..., bool], urgent: Callable[[], bool]
) -> bool:
    """Look at frames until there are no more, time is up, or somebody more urgent waits; whether it was the last."""
    slowest = 0.0
    while not over(slowest):
        batch = reading.batch(looked.next, lambda: over() or urgent())
        if batch is None:
            return not over()
        begin = time.monotonic()  # on the way to the frames others may be asked for
        for frame, outcome in zip(batch, detect(batch), strict=True):
            if outcome is None:
                return False
            if isinstance(outcome, str):
                raise MediaError(f"frame {frame.index} of its video: {outcome}")
            plain = dataclasses.replace(outcome, image=None, signals=None)
            looked.frames.append(dataclasses.replace(plain, frame=frame.index, time=frame.time))
        slowest = max(slowest, time.monotonic() - begin)
        if len(batch) < AT_ONCE:
            looked.done = True
            break
    return False


def checked(file: Path) -> Video:
    """The video in a file, which FFmpeg may be given. Raises MediaError where it is none."""
    if not is_video(file):
        raise MediaError("its video is in no format that a browser plays; use MP4 (H.264) or WebM")
    return Video(file)


def is_video(file: Path) -> bool:
    """Whether the file begins as MP4, MOV, WebM, Matroska, Ogg or AVI do.

    Nothing else is given to FFmpeg, for which a text may be a playlist: names of other files and servers to read.
    """
    with file.open("rb") as stream:
        head = stream.read(12)
    boxes = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    return (
        head[4:8] in boxes
        or head[:4] in (b"\x1a\x45\xdf\xa3", b"OggS")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
    )


def lowest_score(controls: Iterable[Control], default_threshold: float) -> float:
    """The score down to which boxes are wanted for the tracks of these controls."""
    return min([LOW, *(control.lowest_threshold(default_threshold) for control in controls)])


def tracks(
    looked: Looked,
    control: Control,
    label_map: LabelMap,
    *,
    rate: float,
    default_threshold: float,
) -> list[dict[str, Any]]:
    """Label Studio regions of the tracks in a video that was looked at.

    A track begins with a box above the lowest threshold of the control, and is shown if one of its boxes is above the
    threshold of its label. rate: frames per second that Label Studio counts, whatever those of the file;
    default_threshold: where the control names none.
    """
    from yolonas.inference.tracker import Tracker

    high = control.lowest_threshold(default_threshold)
    tracker = Tracker(high, min(LOW, high), max_lost=round(LOST_SECONDS * looked.fps))
    known = np.array(sorted(label_map.to_label), np.int64)
    found = [tracker.update(frame[np.isin(frame.labels, known)]) for frame in looked.frames]
    best: dict[int, float] = {}
    label_of: dict[int, int] = {}
    for frame in found:
        for number, score, label in zip(_numbers(frame).tolist(), frame.scores.tolist(), frame.labels, strict=True):
            best[number] = max(score, best.get(number, 0.0))
            label_of[number] = int(label)
    limits = {n: control.threshold(label_map.to_label[label], default_threshold) for n, label in label_of.items()}
    shown = np.array([number for number, score in best.items() if score > limits[number]], np.int64)
    counted: list[Detections] = []
    for frame in found:
        number = round((frame.time or 0.0) * rate)
        if not counted or number > (counted[-1].frame or 0):  # at a low rate two frames may be one
            kept = frame[np.isin(_numbers(frame), shown)]
            counted.append(dataclasses.replace(kept, frame=number))
    last = counted[-1].frame or 0 if counted else 0
    total = max(math.ceil(looked.seconds * rate - 1e-6), last + 1)
    return to_video_rectangle(counted, control, label_map, fps=rate, frame_count=total)


def _numbers(frame: Detections) -> npt.NDArray[np.int64]:
    assert frame.track_ids is not None  # the tracker gave them
    return frame.track_ids
