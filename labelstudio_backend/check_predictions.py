"""The checks of what is predicted: labels, versions, the order of tasks, and whether corrections are learned."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from labelstudio_backend.backend import Backend, BackendError
from labelstudio_backend.check import Case, Check, State, counted, failed
from labelstudio_backend.connect import SAMPLING
from labelstudio_backend.mapping import Mapped, mapped, served_controls
from labelstudio_backend.registry import Registry
from labelstudio_backend.version import Version, class_names
from yolonas.errors import YolonasError

SHOWN_CLASSES = 10


def _version(case: Case, row: Mapping[str, Any]) -> Version | None:
    """The version that Label Studio was told, where this machine has it."""
    name = str(row.get("model_version"))
    projects = Registry(case.settings.projects_dir).projects()
    return next((v for project in projects for v in project.versions() if v.name == name), None)


def labels(case: Case, state: Mapping[str, Any], row: Mapping[str, Any], backend: Backend) -> Iterator[Check]:
    """Which labels the model's classes become."""
    name, version = "Labels", _version(case, row)
    try:
        controls = served_controls(state["label_config"])
        if not controls:
            text = 'the label config has no <RectangleLabels> on an <Image value="$...">, nor <VideoRectangle>'
            yield Check(name, "FAIL", text, "add one under Settings > Labeling Interface")
            return
        if version is None:
            yield from _labels_told(case, str(row.get("model_version")), backend)
            return
        found = mapped(controls, version, class_names)
    except YolonasError as error:
        yield failed(name, error)
        return
    yield from map(_mapping, found)


def _labels_told(case: Case, version: str, backend: Backend) -> Iterator[Check]:
    """What the backend says of its labels itself, where its state is on another machine."""
    key = version.removeprefix("yolonas-").rpartition("-v")[0]
    try:
        told = backend.call(f"api/projects/{key}")["labels"]
        controls = [(control["name"], control["labels"]) for control in told["controls"]]
    except (BackendError, KeyError, TypeError):
        text = f"{version} is not in {case.settings.state_dir}, so its classes are not known here"
        yield Check("Labels", "WARN", text, "run doctor where the backend runs, with its YOLONAS_STATE_DIR")
        return
    if told.get("problem"):
        yield Check("Labels", "WARN", str(told["problem"]), "run doctor again once something was predicted")
        return
    for name, labels in controls:
        missing = [label for label in labels if not label["classes"]]
        text = _share(len(labels) - len(missing), len(labels), name, [label["label"] for label in missing])
        state: State = "OK" if not missing else "WARN" if len(missing) < len(labels) else "FAIL"
        yield Check("Labels", state, text, str(missing[0].get("advice") or "") if missing else "")


def versions(case: Case, state: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Check]:
    """The version that answers = title = project.model_version."""
    name, version, shown = "Version", str(row.get("model_version")), state.get("model_version")
    if row.get("auto_update") is False:
        yield Check(name, "FAIL", "Label Studio was told to stay at one version of the backend", case.connect)
    elif row.get("title") != version or shown != version:
        text = f"the backend serves {version}, its title is {row.get('title')!r}, the project shows {shown!r}"
        yield Check(name, "FAIL", text, f"{case.connect} (else tasks are not ordered, and predicted twice)")
    else:
        yield Check(name, "OK", f"{version} serves, is the backend's title, and is what the project shows")


def predictions(case: Case, state: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Check]:
    """How many tasks have a prediction of the version that answers."""
    version, kept = str(row.get("model_version")), _version(case, row)
    given, tasks = case.client.model_versions(case.project), int(state["task_number"])
    count, others = given.get(version, 0), sum(given.values()) - given.get(version, 0)
    text = f"{count} of {counted(tasks, 'task')} have a prediction of {version}" + (
        f", {others} predictions are of others" if others else ""
    )
    push = f"yolonas-labelstudio push --project {case.project}"
    if count >= tasks:
        yield Check("Predictions", "OK", text)
    elif others or (kept is not None and kept.trained):
        yield Check("Predictions", "WARN", text, f"{push} makes the rest")
    else:
        yield Check("Predictions", "OK", f"{text}; the others get theirs when they are opened, or all by `{push}`")


def order(case: Case, state: Mapping[str, Any]) -> Iterator[Check]:
    """Whether an opened task gets its prediction, and what comes first."""
    if state.get("show_collab_predictions"):
        yield Check("Live prediction", "OK", "an opened task gets its prediction")
    else:
        yield Check("Live prediction", "WARN", "off: show_collab_predictions is not set", case.connect)
    if state.get("sampling") == SAMPLING:
        yield Check("Order", "OK", "the label stream follows the tasks' scores (YOLONAS_ACQUISITION)")
    else:
        text = f"the label stream has {state.get('sampling')!r}, so it does not follow the tasks' scores"
        yield Check("Order", "WARN", text, f"{case.connect}, unless that is meant")


def training(case: Case, state: Mapping[str, Any], backend: Backend, here: bool) -> Iterator[Check]:
    """Whether corrections are learned."""
    name, can_train = "Training", case.settings.can_train
    if here:
        try:
            can_train = bool(backend.call("").get("can_train"))
        except BackendError as error:
            yield failed(name, error)
            return
    if not can_train:
        advice = "set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN where the backend runs, and start it"
        yield Check(name, "WARN", "not possible: the backend has no access to the annotations", advice)
        return
    every = case.settings.train_every
    when = f"when asked for, and after every {every} corrected tasks" if every else "only when asked for"
    yield Check(name, "OK", f"{when}; {state.get('num_tasks_with_annotations', 0)} tasks are labelled")


def _mapping(one: Mapped) -> Check:
    """How many of a control's labels the model's classes become, and what to write for the others."""
    control, names, unmatched = one.control, one.names or (), one.unmatched
    known = len(control.labels) - len(unmatched)
    text = _share(known, len(control.labels), control.from_name, unmatched)
    if not unmatched:
        return Check("Labels", "OK", text)
    state: State = "WARN" if known else "FAIL"
    if one.version is None:
        return Check("Labels", state, text, str(one.remark))
    if one.own:
        return Check("Labels", state, text, "the version has not learned them: label some, and train")
    first = unmatched[0]
    close = difflib.get_close_matches(first.casefold(), names, 3, 0.6)
    shown = list(dict.fromkeys([*close, *names]))[:SHOWN_CLASSES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    suggestion = close[0] if close else "..."
    return Check(
        "Labels",
        state,
        text,
        f'name the classes that mean it: <Label value="{first}" predicted_values="{suggestion}"/>; the model knows '
        f"{', '.join(shown)}{more} (or train on corrected tasks: then the classes are the labels)",
    )


def _share(known: int, count: int, name: str, unmatched: Sequence[str]) -> str:
    text = f"{known} of {counted(count, 'label')} of <{name}> are predicted"
    return f"{text}, not {', '.join(unmatched)}" if unmatched else text
