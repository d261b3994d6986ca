"""Tasks that somebody had predicted and that have no answer yet, kept on disk: the reconciler asks for them again.

    <state_dir>/projects/<project>/owed.json     {"<task>": time from which it may be asked for again}

A batch action on more tasks than the processor manages in one request would stop half-way, for Label Studio does not
ask again by itself. A trained version is predicted for all tasks in any case; of the start weights only this file says
who was promised boxes. A task is written before the model looks at the first, so that a killed server owes it too.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from labelstudio_backend.locks import locked
from labelstudio_backend.registry import ProjectRegistry
from yolonas.atomic import atomic_file

log = logging.getLogger(__name__)

# Label Studio gives a request up after 100 s, and then may be saving predictions for half a minute. Whoever asks for
# the same tasks before that gets them twice.
GIVEN_UP_SECONDS = 160.0


class Owed:
    """The tasks that a project is owed. Any number of threads and processes may use the file."""

    def __init__(self, project: ProjectRegistry) -> None:
        self._path: Path = project.path / "owed.json"

    def due(self) -> set[int]:
        """Tasks that may be asked for now."""
        now = time.time()
        return {int(task) for task, when in self._tasks().items() if when <= now}

    def promise(self, tasks: Iterable[int]) -> None:
        """Somebody asks for these tasks: they are owed until `settle`, and due once nobody can be waiting any more."""
        when = time.time() + GIVEN_UP_SECONDS
        self._change({str(task): when for task in tasks}, ())

    def settle(self, asked: Iterable[int], unanswered: Iterable[int]) -> None:
        """A request ended: those of its tasks that are still owed are due now, the others are done."""
        asked, unanswered = set(asked), set(unanswered)
        owed = self._tasks().keys() & {str(task) for task in asked}
        due = {str(task): time.time() for task in unanswered if str(task) in owed}
        self._change(due, owed - due.keys())

    def _tasks(self) -> dict[str, float]:
        try:
            return dict(json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}

    def _change(self, new: Mapping[str, float], gone: Iterable[str]) -> None:
        gone = set(gone)
        if not new and not gone:
            return
        try:
            with locked(self._path.with_name(".lock")):
                tasks = {task: when for task, when in self._tasks().items() if task not in gone}
                with atomic_file(self._path) as stream:
                    stream.write(json.dumps({**tasks, **new}).encode())
        except OSError as error:  # a full disk: predictions go on
            log.error("%s could not be written (%s); free some disk space", self._path, error)
