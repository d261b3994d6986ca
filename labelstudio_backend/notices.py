"""What went wrong lately, for the dashboard: the sentences of the log that a person should see without reading it."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

from labelstudio_backend.redaction import redact

KEPT = 50  # of a project
FRESH_SECONDS = 900.0  # what has not been said again for so long is taken as mended


@dataclass
class Notice:
    """A sentence, how often it was said, and when last (Unix seconds)."""

    text: str
    count: int = 0
    last: float = 0.0


class Notices:
    """A bounded memory of sentences for each project. Thread-safe."""

    def __init__(self) -> None:
        self._notices: dict[str, OrderedDict[str, Notice]] = {}
        self._guard = threading.Lock()

    def note(self, project: str, text: str, count: int = 1) -> None:
        """Something about a project happened `count` times."""
        text = redact(text)
        with self._guard:
            notices = self._notices.setdefault(project, OrderedDict())
            notice = notices.setdefault(text, Notice(text))
            if time.time() - notice.last > FRESH_SECONDS:
                notice.count = 0
            notice.count, notice.last = notice.count + count, time.time()
            notices.move_to_end(text)
            if len(notices) > KEPT:
                notices.popitem(last=False)

    def recent(self, project: str) -> list[Notice]:
        """What was said of a project lately, the newest first."""
        now = time.time()
        with self._guard:
            return [
                Notice(notice.text, notice.count, notice.last)
                for notice in reversed(self._notices.get(project, {}).values())
                if now - notice.last < FRESH_SECONDS
            ]
