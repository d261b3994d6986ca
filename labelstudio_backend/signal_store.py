"""What a version said about each task of its project, kept for the order of labelling: a file that grows by lines.

    <state_dir>/projects/<project>/signals/<version>/<host>-<process>.jsonl

Every process writes a file of its own, so that servers on one folder need no lock, and reads all of them. A line that a
crash cut off is passed over; of a task that was predicted again the last line counts. When the first task of a version
is written, the files of all but a few others go: one may be rolled back to, and another server may still be at it.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
import socket
import threading
from collections import OrderedDict
from collections.abc import Collection, Container, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from yolonas.inference.signals import BACKGROUND, ImageSignals

logger = logging.getLogger(__name__)

FOLDER = "signals"
MOST_TASKS = 20_000  # remembered of one project
KEPT_VERSIONS = 3  # beside the one that is written
MOST_BYTES = 128 * 1024**2  # of one process's file, which then begins anew
_FLOATS = ("scores", "margins", "entropies", "spreads")


class SignalStore:
    """Signals by task of one version; labels are indices into `labels`, the project's at present. Thread-safe.

    learnt: the numbers of the tasks that the version has learned from, as its manifest has them. The files are read
    when the first task is asked for or added, by the thread that does; others of the same store wait.
    """

    def __init__(self, project: Path, version: str, labels: Sequence[str], learnt: Container[str] = ()) -> None:
        self.version, self.labels = version, tuple(labels)
        self._folder = project / FOLDER / version
        self._file = self._folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
        self._learnt = learnt
        self._known: OrderedDict[int, ImageSignals] | None = None  # None: not read yet
        self._orders: tuple[OrderedDict[int, None], ...] = (OrderedDict(), OrderedDict())  # not learnt, learnt
        self._lock = threading.Lock()  # of the two above
        self._writing = threading.Lock()

    def tasks(self) -> dict[int, ImageSignals]:
        """Signals by task, the latest last."""
        with self._lock:
            return dict(self._tasks())

    def latest(self, count: int, without: Collection[int] = ()) -> tuple[list[ImageSignals], list[ImageSignals]]:
        """The last `count` tasks that were learnt, and that many others, but for those named: the latest first."""
        with self._lock:
            tasks = self._tasks()
            rest, learnt = (
                [tasks[task] for task in islice((t for t in reversed(order) if t not in without), count)]
                for order in self._orders
            )
            return learnt, rest

    def add(self, found: Mapping[int, ImageSignals]) -> None:
        """Remember what was found; where it cannot be written, with a line in the log, until the process ends."""
        with self._lock:
            tasks = self._tasks()
            new = {task: s for task, s in found.items() if not _same(s, tasks.get(task))}
            for task, signals in new.items():
                self._remember(tasks, task, signals)
        try:
            lines = "".join(_line(task, signals, self.labels) for task, signals in new.items())
            with self._writing:
                self._append(lines)
        except OSError as error:
            logger.error("what %s said about its tasks could not be written: %s", self.version, error)

    def _tasks(self) -> OrderedDict[int, ImageSignals]:
        if self._known is None:
            known: OrderedDict[int, ImageSignals] = OrderedDict()
            for task, signals in self._read():
                self._remember(known, task, signals)
            self._known = known
        return self._known

    def _remember(self, tasks: OrderedDict[int, ImageSignals], task: int, signals: ImageSignals) -> None:
        order = self._order(task)
        tasks[task], order[task] = signals, None
        tasks.move_to_end(task)
        order.move_to_end(task)
        while len(tasks) > MOST_TASKS:
            oldest, _ = tasks.popitem(last=False)
            del self._order(oldest)[oldest]

    def _order(self, task: int) -> OrderedDict[int, None]:
        return self._orders[str(task) in self._learnt]

    def _append(self, lines: str) -> None:
        if not lines:
            return
        if not self._folder.is_dir():
            self._folder.mkdir(parents=True, exist_ok=True)
            others = [other for other in self._folder.parent.iterdir() if other != self._folder]
            for other in sorted(others, key=_changed, reverse=True)[KEPT_VERSIONS:]:
                shutil.rmtree(other, ignore_errors=True)
        full = self._file.exists() and self._file.stat().st_size > MOST_BYTES
        with self._file.open("wb" if full else "ab") as stream:
            # after what a full disk cut off the next line must not go on; readers pass over an empty one
            stream.write(b"\n" + lines.encode())

    def _read(self) -> list[tuple[int, ImageSignals]]:
        files = sorted(self._folder.glob("*.jsonl"), key=_changed)
        found = []
        for file in files:
            with file.open("rb") as stream:
                for line in stream:
                    try:
                        found.append(_parse(json.loads(line), self.labels))
                    except (ValueError, KeyError, TypeError):  # cut off, or of another release
                        continue
        return found


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was quicker
        return 0.0


def _same(a: ImageSignals, b: ImageSignals | None) -> bool:
    return b is not None and len(a) == len(b) and np.allclose(a.scores, b.scores, atol=1e-3)


def _line(task: int, signals: ImageSignals, labels: Sequence[str]) -> str:
    """One task as JSON: numbers of boxes as float16, classes by name, so that they outlive another label config."""
    used = sorted({int(label) for label in (*signals.labels, *signals.rivals) if label != BACKGROUND})
    place = {label: index for index, label in enumerate(used)} | {BACKGROUND: BACKGROUND}
    classes = [[place[int(label)] for label in row] for row in (signals.labels, signals.rivals)]
    record = {
        "task": task,
        "names": [labels[label] for label in used],
        "boxes": _packed(np.array([getattr(signals, name) for name in _FLOATS], "<f2")),
        "classes": _packed(np.array(classes, "<i2")),
        "feature": _packed(np.array(signals.feature, "<f4")),
        "disagreement": signals.disagreement,
    }
    return json.dumps(record, ensure_ascii=False) + "\n"


def _parse(record: dict[str, Any], labels: Sequence[str]) -> tuple[int, ImageSignals]:
    """What `_line` wrote, without boxes whose label the project no longer has."""
    names = [labels.index(name) if name in labels else None for name in record["names"]]
    floats = _unpacked(record["boxes"], "<f2").reshape(len(_FLOATS), -1).astype(np.float64)
    own, rivals = _unpacked(record["classes"], "<i2").reshape(2, -1).tolist()
    known = [index for index, label in enumerate(own) if names[label] is not None]
    signals = ImageSignals(
        labels=np.array([names[own[index]] for index in known], np.int64),
        rivals=np.array([_rival(names, rivals[index]) for index in known], np.int64),
        feature=_unpacked(record["feature"], "<f4").astype(np.float64),
        disagreement=record["disagreement"],
        **{name: row[known] for name, row in zip(_FLOATS, floats, strict=True)},
    )
    return int(record["task"]), signals


def _rival(names: Sequence[int | None], rival: int) -> int:
    name = None if rival == BACKGROUND else names[rival]
    return BACKGROUND if name is None else name


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
