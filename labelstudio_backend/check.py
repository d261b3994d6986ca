"""What `doctor` looks at and what it says of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from labelstudio_backend.backend import Credentials
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError

State = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    text: str
    advice: str = ""


@dataclass
class Case:
    """One project's connection that is looked at: with what settings, by which client and transport.

    url: the backend's address as Label Studio has it, once its row is found; before that the one that was asked for.
    rows: those of the project's backends, once they were asked for.
    """

    settings: Settings
    client: LabelStudio
    project: int
    url: str | None
    transport: httpx.BaseTransport | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def credentials(self) -> Credentials:
        return Credentials.of(self.settings)

    @property
    def connect(self) -> str:
        """The command that repairs the connection."""
        return f"yolonas-labelstudio connect --project {self.project} --url {self.url or 'ADDRESS'}"


def failed(name: str, error: YolonasError) -> Check:
    """An error's sentence: what is wrong, and behind the semicolon what to do."""
    text, _, advice = str(error).partition("; ")
    return Check(name, "FAIL", text, advice)


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
