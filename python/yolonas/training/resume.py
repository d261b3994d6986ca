"""The file from which a run goes on after it was stopped."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from yolonas.atomic import atomic_file
from yolonas.errors import CheckpointError

RESUME_FILE = "resume.pt"
FREE_ON_RESUME = ("workers", "cache_bytes", "time_budget_s")  # fields of the recipe that may differ when a run goes on


def write_resume(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state; the file appears complete or not at all."""
    data = io.BytesIO()  # torch.save on a full disk raises a riddle; the write below raises OSError
    torch.save(state, data)
    with atomic_file(path) as file:
        file.write(data.getbuffer())


def read_resume(path: Path) -> dict[str, Any]:
    """The state that a run left at `path`; raises CheckpointError where there is none or it is damaged."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no {path} to resume from") from error
    except Exception as error:  # torch raises whatever a damaged file leads its readers to
        raise CheckpointError(f"{path} is damaged and cannot be resumed from: begin a new run") from error
    return state


def check_resume(path: Path, state: Mapping[str, Any], recipe: Mapping[str, Any], fingerprint: list[Any]) -> None:
    """Raise CheckpointError where the run that left `state` had another recipe, other data or another model."""
    changed = [name for name in recipe if state["recipe"].get(name) != recipe[name] and name not in FREE_ON_RESUME]
    if changed:
        raise CheckpointError(f"{path} was made with another {', '.join(changed)}: resume with the same recipe")
    if state["data"] != fingerprint:
        raise CheckpointError(f"{path} was made with other data or another model: begin a new run elsewhere")


def weights_checksum(model: nn.Module) -> int:
    """CRC-32 of the weights: whether two runs begin from the same."""
    checksum = 0
    for tensor in model.state_dict().values():
        checksum = zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), checksum)
    return checksum
