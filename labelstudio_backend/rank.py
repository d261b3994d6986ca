"""`yolonas-labelstudio rank`: which task of a project to label next and why, and that order into Label Studio."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
import numpy as np

from labelstudio_backend.acquisition import by_chance, older_regions, reasons, regions_disagreement
from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.connect import SAMPLING
from labelstudio_backend.mapping import served_controls
from labelstudio_backend.options import label_studio, project_options
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.signal_store import SignalStore
from labelstudio_backend.version import Version
from yolonas.active_learning import BACKGROUND, STRATEGIES, ImageSignals, class_doubt, select
from yolonas.errors import DataError
from yolonas.labelstudio import Control, boxes_from_annotation, choose_annotation, class_names
from yolonas.labelstudio_video import labelled_frames

SAME_SCORE = 5e-7  # Label Studio keeps floats; ours have six digits
LARGE = 10_000  # px: a side for annotations whose images are not needed


@dataclass(frozen=True)
class Ranked:
    """A task that nobody has labelled, in its place: the score that says so, and the one that is stored."""

    task: int
    prediction: int
    score: float
    stored: float | None
    reason: str


@dataclass(frozen=True)
class Ranking:
    """The order of a project's unlabelled tasks, best first.

    labelled: how many tasks are labelled. missing: tasks without a prediction of the version, which are in no order.
    unseen: ordered images of which only the boxes' scores are known, not what the version said about them.
    """

    version: str
    order: list[Ranked]
    labelled: int
    missing: int
    unseen: int


@click.command()
@project_options
@click.option("--strategy", type=click.Choice(list(STRATEGIES)), help="What to go by.  [default: the backend's]")
@click.option("--write", is_flag=True, help="Store the order in Label Studio, for its uncertainty sampling.")
@click.option("--top", type=click.IntRange(0), default=20, show_default=True, help="How many tasks to show.")
@click.option("--state-dir", help="The backend's folder of versions, where it keeps what they said about the tasks.")
def rank(project: int, strategy: str | None, write: bool, top: int, **options: Any) -> None:
    """Show which tasks to label next, and why; with --write, have Label Studio serve them in this order.

    Only tasks that nobody has labelled or skipped are ordered. Run it where the backend runs, again after more labels
    or a new version; after an interruption it goes on with what is not written yet.
    """
    settings = settings_from(**options)
    with label_studio(settings) as client:
        state = client.get_project(project)
        registry = find_project(Registry(settings.projects_dir), state)
        ranking = rank_project(client, registry, state, strategy or settings.acquisition, progress=True)
        for line in describe(ranking, top):
            click.echo(line)
        if write:
            written = write_order(client, ranking.order, progress=True)
            click.echo(f"{written} scores written, {len(ranking.order) - written} were right.")
        if write and state.get("sampling") != SAMPLING:
            click.echo(
                f'Label Studio serves this project by "{state.get("sampling")}"; for this order set its sampling: '
                f'PATCH {client.url}/api/projects/{project} {{"sampling": "{SAMPLING}"}}'
            )
        if write and state.get("model_version") != ranking.version:
            click.echo(
                f"The project shows predictions of {state.get('model_version')!r}, not of {ranking.version}: the order "
                "counts once they are the same; the backend's title in Label Studio must be its version"
            )


def find_project(registry: Registry, state: Mapping[str, Any]) -> ProjectRegistry:
    """The backend's side of a project of Label Studio's. Raises DataError where it is not known."""
    found = registry.find(project_uid(state))
    if found is None:
        raise DataError(
            f"project {state['id']} is not known in {registry.root}: run this where the backend runs, with its "
            "YOLONAS_STATE_DIR, after the project was connected to it"
        )
    return found


def rank_project(
    client: LabelStudio,
    project: ProjectRegistry,
    state: Mapping[str, Any],
    strategy: str,
    *,
    progress: bool = False,
) -> Ranking:
    """The exact order of all unlabelled tasks that have a prediction of the current version.

    Scores grow evenly from 0 to 1 along it. What the version said about a task comes from the backend's folder, what is
    labelled and what older versions drew from Label Studio. Raises LabelStudioError, RegistryError, LabelConfigError.
    """
    from tqdm import tqdm

    version = project.current()
    controls = served_controls(state["label_config"])
    labels, images = class_names(controls), any(control.media == "image" for control in controls)
    stored = SignalStore(project.path, version.name, labels).tasks()
    candidates: dict[int, Mapping[str, Any]] = {}
    signals: list[ImageSignals] = []
    labelled: list[ImageSignals] = []
    missing, unseen = 0, 0
    tasks = tqdm(
        client.iter_tasks(project.project_id), "tasks", unit="task", disable=None if progress else True, leave=False
    )
    for task in tasks:
        known = stored.get(task["id"])
        annotation = choose_annotation(task.get("annotations"))
        if annotation is not None:
            truth = _labels_drawn(annotation, controls, labels)
            labelled.append((known or _by_scores([], labels)).labelled_as(truth))
            continue
        if task.get("annotations"):
            continue  # skipped
        prediction = _prediction(task, version)
        if prediction is None:
            missing += 1
            continue
        if known is None:  # always so of a video, which goes by its tracks
            unseen += images
            known = _by_scores(prediction["result"], labels)
        older = older_regions(task.get("predictions"), version.name) if images else None
        differs = known.disagreement if older is None else regions_disagreement(prediction["result"], older)
        candidates[task["id"]] = prediction
        signals.append(dataclasses.replace(known, disagreement=differs))
    signals, labelled = _with_features(signals, labelled)
    ids = list(candidates)
    if strategy == "random":
        order = sorted(range(len(ids)), key=lambda index: by_chance(version.name, ids[index]))
    else:
        order = select(signals, labelled, strategy)
    why = reasons(signals, labelled, strategy, labels)
    ranked = [
        Ranked(
            task=ids[index],
            prediction=int(candidates[ids[index]]["id"]),
            score=round((place + 1) / (len(order) + 1), 6),
            stored=candidates[ids[index]].get("score"),
            reason=why[index],
        )
        for place, index in enumerate(order)
    ]
    return Ranking(version.name, ranked, len(labelled), missing, unseen)


def write_order(client: LabelStudio, order: Iterable[Ranked], *, progress: bool = False) -> int:
    """Store the scores with the predictions, best first; those that are right already are left. Returns how many."""
    from tqdm import tqdm

    wrong = [task for task in order if task.stored is None or abs(task.stored - task.score) > SAME_SCORE]
    for task in tqdm(wrong, "scores", unit="task", disable=None if progress else True, leave=False):
        client.patch_prediction(task.prediction, score=task.score)
    return len(wrong)


def describe(ranking: Ranking, top: int) -> list[str]:
    """The first `top` tasks as a table, and a line on what is behind it."""
    shown = ranking.order[:top]
    lines = [f"{'task':>8}  {'score':>8}  why"] if shown else []
    lines += [f"{task.task:>8}  {task.score:8.6f}  {task.reason}" for task in shown]
    if len(ranking.order) > len(shown) > 0:
        lines.append(f"and {len(ranking.order) - len(shown)} more")
    lines.append(
        f"{len(ranking.order)} unlabelled tasks in order by {ranking.version}; {ranking.labelled} are labelled."
    )
    if ranking.missing:
        lines.append(
            f"{ranking.missing} unlabelled tasks have no prediction of {ranking.version} yet and are in no order."
        )
    if ranking.unseen:
        lines.append(
            f"Of {ranking.unseen} tasks only the scores of the boxes are known in this folder: they were predicted on "
            "another machine, or before this release."
        )
    return lines


def _prediction(task: Mapping[str, Any], version: Version) -> Mapping[str, Any] | None:
    """The task's latest prediction of the version."""
    own = [p for p in task.get("predictions") or () if p.get("model_version") == version.name]
    return max(own, key=lambda prediction: int(prediction["id"]), default=None)


def _labels_drawn(annotation: Mapping[str, Any], controls: Sequence[Control], labels: Sequence[str]) -> list[int]:
    drawn: list[str] = []
    for control in controls:
        result = annotation["result"]
        shown = labelled_frames(result, [control]).values() if control.media == "video" else [result]
        drawn += [label for regions in shown for label in boxes_from_annotation(regions, control, LARGE, LARGE)[1]]
    return [labels.index(label) for label in drawn if label in labels]


def _by_scores(result: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> ImageSignals:
    """The signals of stored regions, of which nothing but labels and scores is known; the feature is left empty."""
    values = [(region, region.get("value") or {}) for region in result]
    boxes = [
        (labels.index(label), float(region.get("score") or 0.5))
        for region, value in values
        for label in value.get("rectanglelabels") or value.get("labels") or ()  # the latter of a track
        if label in labels
    ]
    scores = np.clip([score for _, score in boxes], 1e-6, 1 - 1e-6)
    margins, entropies, rivals = class_doubt(np.log(scores / (1 - scores)).reshape(-1, 1))
    spreads = np.zeros(len(boxes))
    own = np.array([label for label, _ in boxes], np.int64)
    return ImageSignals(scores, own, margins, entropies, np.full_like(rivals, BACKGROUND), spreads, np.zeros(0))


def _with_features(*groups: list[ImageSignals]) -> tuple[list[ImageSignals], ...]:
    """The same signals, with the mean feature for those that have none: as near to the others as can be."""
    known = [signals.feature for group in groups for signals in group if len(signals.feature)]
    length = len(known[-1]) if known else 1
    mean = np.mean([feature for feature in known if len(feature) == length], axis=0) if known else np.zeros(1)
    return tuple(
        [s if len(s.feature) == length else dataclasses.replace(s, feature=mean) for s in group] for group in groups
    )
