"""Weights that a tag of the label config asks for by `model_path`: which file or name, and whether it may have them.

Whoever edits a label config may name what the operator of this backend has put there, and nothing else: published
weights by name, and files inside the folder $YOLONAS_WEIGHTS_DIR or the one that the start weights lie in.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yolonas.errors import WeightsError
from yolonas.labelstudio import Control
from yolonas.weights import PUBLISHED, SHIPPED

if TYPE_CHECKING:
    from labelstudio_backend.version import Version


def find(model_path: str, start: str) -> str:
    """The name of weights, or the absolute path of a file, that a `model_path` stands for.

    start: the start weights, a file or a name. Raises WeightsError for what is not there or not allowed.
    """
    for name in (model_path, Path(model_path).stem, f"{Path(model_path).stem}_coco"):
        if name in SHIPPED or name in PUBLISHED:
            return name
    folders = [Path(start).parent] if Path(start).is_absolute() else []
    if os.environ.get("YOLONAS_WEIGHTS_DIR"):
        folders.insert(0, Path(os.environ["YOLONAS_WEIGHTS_DIR"]).expanduser())
    for folder in folders:
        try:
            file = (folder / model_path).resolve()  # follows links too: the file itself must lie there
            if file.is_relative_to(folder.resolve()) and file.is_file():
                return str(file)
        except (OSError, ValueError, RuntimeError):  # too long, a zero byte, a loop of links
            continue
    places = " or ".join(map(str, folders)) or "YOLONAS_WEIGHTS_DIR, which is not set"
    names = ", ".join([*SHIPPED, *PUBLISHED])
    raise WeightsError(
        f'model_path="{model_path}" is no name of weights ({names}) and no file in {places}; correct it in the label '
        "config, or put the file there"
    )


def start_weights(controls: Iterable[Control], start: str) -> tuple[str, dict[str, str]]:
    """What a project starts from, and the weights of the tags that differ, by the tag's name.

    start: the start weights of the settings. Where all tags ask for the same, the project itself starts from these, and
    so does its first training. A `model_path` that cannot be used is left out.
    """
    asked = {control.from_name: _found(control, start) if control.model_path else start for control in controls}
    found = {name: weights for name, weights in asked.items() if weights is not None}
    if len(found) == len(asked) and len(set(found.values())) == 1:
        return next(iter(found.values())), {}
    return start, {name: weights for name, weights in found.items() if weights != start}


def version_for(version: Version, control: Control) -> Version | None:
    """What predicts for a tag: the version, under another name with the tag's own weights, or None where `model_path`
    cannot be used. A version trained in the project predicts for all tags.
    """
    if version.trained or not control.model_path:
        return version
    tag = version.record.get("tags", {}).get(control.from_name)
    if tag is not None:
        return dataclasses.replace(
            version, name=f"{version.name} <{control.from_name}>", record={"kind": version.record["kind"], **tag}
        )
    return version if _found(control, version.weights) == version.weights else None


def by_weights(version: Version, controls: Sequence[Control]) -> list[tuple[Version, list[int]]]:
    """What predicts, each with the numbers of its controls; those whose `model_path` cannot be used are left out."""
    groups: dict[str, tuple[Version, list[int]]] = {}
    for number, control in enumerate(controls):
        served = version_for(version, control)
        if served is not None:
            groups.setdefault(served.weights, (served, []))[1].append(number)
    return list(groups.values())


def problem(version: Version, control: Control) -> str | None:
    """A sentence on a `model_path` that is not used; None where all is well."""
    if not control.model_path:
        return None
    if version.trained:
        return f'model_path="{control.model_path}" is not used any more: this version was trained in the project'
    if version_for(version, control) is not None:
        return None
    try:
        find(control.model_path, version.weights)
    except WeightsError as error:
        return f"no boxes: {error}"
    return f'no boxes yet: model_path="{control.model_path}" is new; open the model page of the project in Label Studio'


def _found(control: Control, start: str) -> str | None:
    try:
        return find(control.model_path, start)
    except WeightsError:
        return None
