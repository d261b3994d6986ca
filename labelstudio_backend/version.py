"""One version of a project's model: what it is, how its model is loaded, and how two of them compare."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from labelstudio_backend.locks import in_use
from labelstudio_backend.settings import UNTRAINED
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint

CHECKPOINT = "model.safetensors"
RECORD = "record.json"
START, TRAINED = "start", "trained"
PUBLISHED = "yolo_nas_s_coco"


class RegistryError(YolonasError):
    """A project or version that is not there, or a registry that cannot be read or written."""


class MissingVersionError(RegistryError):
    """A version that is not there, which says nothing against making one."""


class Figures(TypedDict):
    """AP at IoU 0.50 to 0.95, AP at 0.50, and AP of each class; None and empty where they were not measured."""

    ap: float | None
    ap50: float | None
    per_class: dict[str, float]


@dataclass(frozen=True)
class Version:
    """One immutable version of one project's model; `name` is what Label Studio knows as `model_version`."""

    name: str
    number: int
    project_key: str
    path: Path
    record: dict[str, Any] = field(compare=False, hash=False)

    @property
    def trained(self) -> bool:
        """Whether it was trained in the project, so that its class names are the project's labels."""
        return bool(self.record["kind"] == TRAINED)

    @property
    def weights(self) -> str:
        """A trained version's own checkpoint file; a start version's file, published name or `untrained-n`."""
        return str(self.path / CHECKPOINT) if self.trained else str(self.record["weights"])

    @property
    def removed(self) -> bool:
        """Whether only its record is left."""
        return "removed" in self.record

    def in_use(self) -> AbstractContextManager[None]:
        """While its files are read: retention then leaves them."""
        return in_use(self.path / RECORD)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a version whose classes are the project's labels; None where its record has none."""
        labels = self.record.get("labels")
        return None if labels is None else tuple(labels)

    @property
    def figures(self) -> Figures:
        """Its own, on its held-out images."""
        return _figures(self.record.get("after"))

    @property
    def base_figures(self) -> Figures:
        """Those of the version that it was trained from, on the same images."""
        return _figures(self.record.get("before"))


def _figures(measured: Mapping[str, Any] | None) -> Figures:
    found = measured or {}
    return {"ap": found.get("ap"), "ap50": found.get("ap50"), "per_class": found.get("per_class") or {}}


def load_checkpoint(version: Version) -> Checkpoint:
    """The model of a version; may download published weights, so never call it from a request that must be quick.

    `untrained-n` is drawn anew with a fixed seed, so it is the same model each time.
    """
    from yolonas import checkpoint, weights

    if version.removed:
        raise RegistryError(f"only the record of {version.name} is left; its files were removed")
    if version.weights != UNTRAINED:
        return checkpoint.load(version.weights if version.trained else weights.resolve(version.weights))
    import torch

    from yolonas.model import YoloNAS

    labels = version.record["labels"] or ["object"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YoloNAS("n", num_classes=len(labels), class_names=labels).eval()
    return checkpoint.Checkpoint(model=model, record={"start": UNTRAINED})


def class_names(version: Version) -> tuple[str, ...]:
    """The classes of a version, without a download; raises YolonasError for a file that cannot be read."""
    if version.labels is not None:
        return version.labels
    from yolonas import checkpoint, weights

    if not version.trained and version.weights in weights.SHIPPED:
        return checkpoint.load(weights.resolve(version.weights)).model.class_names
    if not version.trained and version.record.get("stamp") is None:  # no file
        from yolonas.model.config import COCO_NAMES

        return COCO_NAMES  # what is published is trained on COCO
    return checkpoint.load(version.weights).model.class_names


def choose_weights(wanted: str) -> tuple[str, str]:
    """What new projects start from -> the value to serve with, and a sentence that says so.

    `auto` is yolo_nas_s_coco where it can be had, else `untrained-n`; a file becomes its absolute path. May download.
    Raises WeightsError or FileNotFoundError for weights that were asked for and cannot be had.
    """
    from yolonas import weights

    if wanted == UNTRAINED:
        return UNTRAINED, "an untrained model (variant n): it knows nothing until it has learned from your first labels"
    if Path(wanted).is_file():
        return str(Path(wanted).resolve()), f"the checkpoint {wanted}"
    name = PUBLISHED if wanted == "auto" else wanted
    try:
        return name, f"the weights {name} ({weights.resolve(name)})"
    except YolonasError as error:
        if wanted != "auto":
            raise
        sentence = "an untrained model (variant n), which learns from your first labels"
        return UNTRAINED, f"{sentence}, because no published weights can be had ({error})"


def summary(version: Version) -> dict[str, Any]:
    """What a list shows of a version; AP, AP50 and AP of each class are on its held-out images, None if unknown."""
    record = version.record
    return {
        "name": version.name,
        "number": version.number,
        "parent": record.get("parent"),
        "published": record["published"],
        "removed": version.removed,
        **version.figures,
        "tasks": record.get("tasks", {}),
        "gate": record.get("gate", {}),
    }


def compare(a: Version, b: Version) -> dict[str, Any]:
    """Two versions side by side, and `change`: b minus a where both are known.

    `same_images` says that b was trained from a, and both measured on b's held-out images; otherwise each figure is of
    the version's own held-out images, which grow with the labels.
    """
    left, right = summary(a), summary(b)
    same_images = b.record.get("base") == a.name and bool(b.record.get("before"))
    if same_images:
        left |= b.base_figures
    change: dict[str, Any] = {
        name: round(right[name] - left[name], 4) for name in ("ap", "ap50") if None not in (left[name], right[name])
    }
    both = left["per_class"].keys() & right["per_class"].keys()
    change["per_class"] = {name: round(right["per_class"][name] - left["per_class"][name], 4) for name in sorted(both)}
    return {"a": left, "b": right, "change": change, "same_images": same_images}
