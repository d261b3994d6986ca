"""A training job: what is known of it, its states, and its folder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["queued", "running", "succeeded", "refused", "failed", "cancelled"]
STOPPED = 75  # EX_TEMPFAIL: a job's process says that it was asked to end by SIGTERM
FINAL: tuple[State, ...] = ("succeeded", "refused", "failed", "cancelled")
IN_VAIN: tuple[State, ...] = ("failed", "cancelled")  # ended without having learnt anything; may be run again


@dataclass(frozen=True)
class Job:
    """One training job as the queue knows it.

    `trigger` says why it was queued; `reason` where it stands, or why it ended as it did; `progress` runs from 0 to 1;
    `epoch` counts from 1, `seconds_left` is the training's own estimate and `curve` what it measured so far, a
    {"epoch", "loss", "ap50"} each, ap50 where it was measured; `manifest` maps task ids to what was learnt from them
    (`None` before the annotations were pulled); times are Unix seconds.
    """

    id: int
    project: str
    trigger: str
    created: float
    state: State = "queued"
    reason: str = ""
    progress: float = 0.0
    epoch: int | None = None
    seconds_left: float | None = None
    restarts: int = 0
    cancel: bool = False
    version: str | None = None
    started: float | None = None
    finished: float | None = None
    curve: list[dict[str, Any]] = field(default_factory=list, repr=False)
    manifest: dict[str, str] | None = field(default=None, repr=False)
    record: dict[str, Any] = field(default_factory=dict, repr=False)


LONG = ("curve", "manifest", "record")  # fields that grow with tasks and epochs; left out where a list is to be brief


def last_ap50(curve: Sequence[Mapping[str, Any]]) -> float | None:
    """The newest measured AP50 of a job's curve, `None` where there is none yet."""
    return next((point["ap50"] for point in reversed(curve) if point.get("ap50") is not None), None)


def tidy(folder: Path) -> None:
    """Remove from an ended job's folder what only a running one needs: images, checkpoints and exported files.

    Its log, its list of data and the curves stay, and what may not be removed: a worker's user may be another one.
    """
    for name in ("images", "serving"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for pattern in ("*.safetensors", "training/*.safetensors", "training/resume.pt"):
        for path in folder.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
