"""Which classes of which weights become which labels of a project, as the log, the dashboard and `doctor` tell it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from labelstudio_backend.settings import UNTRAINED
from labelstudio_backend.tag_weights import problem, version_for
from labelstudio_backend.version import Version
from yolonas.labelstudio import Control, map_labels, parse_label_config


@dataclass(frozen=True)
class Mapped:
    """A control and what predicts for it.

    version: the project's, or one with the tag's own weights; None where its `model_path` cannot be used. names: the
    classes of these weights, None where they are not known yet. classes: of each label, those that become it.
    remark: a sentence on a `model_path` that is not used.
    """

    control: Control
    version: Version | None
    names: tuple[str, ...] | None
    classes: dict[str, list[str]]
    remark: str | None

    @property
    def own(self) -> bool:
        """Whether the classes are the project's labels."""
        return self.version is not None and own_labels(self.version)

    @property
    def unmatched(self) -> list[str]:
        """The labels that no class becomes."""
        return [label for label, classes in self.classes.items() if not classes]


def served_controls(label_config: str | None) -> list[Control]:
    """The tags of a label config that want predictions. Raises LabelConfigError."""
    return [control for control in parse_label_config(label_config or "<View/>") if control.labels and not control.skip]


def own_labels(version: Version) -> bool:
    """Whether the version's classes are the project's labels."""
    return version.trained or version.weights == UNTRAINED


def mapped(
    controls: Sequence[Control], version: Version, names: Callable[[Version], Sequence[str] | None]
) -> list[Mapped]:
    """What predicts for each control; `names` gives the classes of a version, None where they are not known."""
    found = []
    for control in controls:
        served, classes = version_for(version, control), {label: list[str]() for label in control.labels}
        known = None if served is None else names(served)
        if served is not None and known is not None:
            for index, label in map_labels(control, known, own=own_labels(served)).to_label.items():
                classes[label].append(known[index])
        remark = problem(version, control)
        found.append(Mapped(control, served, None if known is None else tuple(known), classes, remark))
    return found


def describe(found: Sequence[Mapped], version: Version) -> list[str]:
    """A line for each control: the classes of each label, and the labels that none becomes."""
    lines = []
    for one in found:
        text = f"<{one.control.from_name}> "
        if one.version is None:
            lines.append(f"{text}{one.remark}")
            continue
        if one.names is None:
            lines.append(f"{text}is predicted by {one.version.weights}")
            continue
        known = (f"{label} <- {' + '.join(classes)}" for label, classes in one.classes.items() if classes)
        text += ", ".join(known) or "no label is known to the model"
        if one.version is not version:
            text += f", by {one.version.weights}"
        if one.unmatched:
            text += f"; not predicted: {', '.join(one.unmatched)}"
            if not one.own:
                text += ' (no class of that name; predicted_values="..." on the Label names other classes)'
        lines.append(text if one.remark is None else f"{text}; {one.remark}")
    return lines
