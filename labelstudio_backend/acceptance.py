"""How much work predictions save: what people did to the predicted boxes of the tasks that they labelled.

Pure: it reads what Label Studio says of a task (`LabelStudio.iter_tasks`, an export), and asks nobody.
"""

from __future__ import annotations

import functools
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import overlaps
from yolonas.inference.assignment import Indices, assign
from yolonas.inference.detections import Detections
from yolonas.labelstudio import Control, boxes_from_annotation, choose_annotation

SAME_IOU = 0.7  # of a box that was left as it is: below, somebody moved it
# A predicted box that overlaps the object by less is deleted, and the object drawn anew: two edits; a move is one.
NEAR_IOU = 0.3
THRESHOLDS = tuple(step / 40 for step in range(2, 39))  # 0.05, 0.075 .. 0.95
_CANVAS = 10_000  # px, where a region does not say how large its image is: percent to two digits


class Boxes(NamedTuple):
    """Boxes of one image: [n, 4] xyxy, in any unit that both sides of a comparison share, and their n classes."""

    boxes: npt.NDArray[np.floating[Any]]
    labels: Sequence[Hashable]


@dataclass(frozen=True)
class Edits:
    """What became of predicted boxes, each counted once, and how many were drawn by hand; they add up with `+`."""

    kept: int = 0
    moved: int = 0  # same class, but IoU under SAME_IOU, or known to have been touched
    relabelled: int = 0
    removed: int = 0
    added: int = 0

    @property
    def predicted(self) -> int:
        """How many boxes were predicted."""
        return self.kept + self.moved + self.relabelled + self.removed

    @property
    def final(self) -> int:
        """How many boxes there are in the end: what a person without predictions would have drawn."""
        return self.kept + self.moved + self.relabelled + self.added

    @property
    def total(self) -> int:
        """How many boxes a person had to do something about."""
        return self.moved + self.relabelled + self.removed + self.added

    @property
    def acceptance(self) -> float | None:
        """Share of the predicted boxes that were left as they were; None where none was predicted."""
        return self.kept / self.predicted if self.predicted else None

    @property
    def saved(self) -> float | None:
        """Share of the edits of drawing every box by hand that was saved; below 0 where predictions were a burden."""
        return 1 - self.total / self.final if self.final else None

    def __add__(self, other: Edits) -> Edits:
        return Edits(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def pair(predicted: Boxes, final: Boxes) -> tuple[Indices, Indices]:
    """The predicted boxes that became final ones, and which: rows, ascending, and columns of the pairs.

    One to one and optimal: of all pairings one with the fewest edits and, among those, the largest sum of IoU. Boxes of
    one class pair from an IoU of NEAR_IOU on, boxes of different classes from SAME_IOU on: what needs both a new class
    and another place is no cheaper to edit than to draw anew.
    """
    iou, same = _compared(predicted, final)
    edits = np.where(same & (iou >= SAME_IOU), 0.0, 1.0)
    near = iou >= np.where(same, NEAR_IOU, SAME_IOU)
    # Unpaired, the two boxes cost two edits. All IoU together weigh less than one edit.
    return assign(np.where(near, edits - iou / (2 * max(*iou.shape, 1)), 2.0), 2.0)


def compare(predicted: Boxes, final: Boxes) -> Edits:
    """The edits that make the final boxes of one image of the predicted ones, paired as `pair` does."""
    rows, columns = pair(predicted, final)
    iou, same = _compared(predicted, final)
    moved = int((same & (iou < SAME_IOU))[rows, columns].sum())
    relabelled = int((~same)[rows, columns].sum())
    return Edits(
        kept=len(rows) - moved - relabelled,
        moved=moved,
        relabelled=relabelled,
        removed=len(predicted.labels) - len(rows),
        added=len(final.labels) - len(rows),
    )


def fewest_edits_threshold(data: LabelledImages, detections: Sequence[Detections]) -> float:
    """The score threshold at which the detections above it leave people the fewest edits; of several the middle one.

    It lies above the one with the best F1: a box that is shown in vain costs an edit, as does one that is missing, and
    only one that can be left as it is saves any. So a version that knows little shows little. One of THRESHOLDS;
    `detections`, in the data's labels, must go down to the first of them.
    """
    edits = []
    for threshold in THRESHOLDS:
        total = 0
        for image, found in zip(data.images, detections, strict=True):
            shown, true = found.scores > threshold, ~image.crowd
            before = Boxes(found.boxes[shown], found.labels[shown].tolist())
            total += compare(before, Boxes(image.boxes[true], image.labels[true].tolist())).total
        edits.append(total)
    best = [threshold for threshold, total in zip(THRESHOLDS, edits, strict=True) if total == min(edits)]
    return best[len(best) // 2]


def _compared(predicted: Boxes, final: Boxes) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """IoU [n, m], and whether the classes are the same [n, m]."""
    a, b = (np.asarray(side.boxes, np.float32).reshape(-1, 4) for side in (predicted, final))
    same = [[one == other for other in final.labels] for one in predicted.labels]
    return overlaps(a, b, np.zeros(len(b), bool)), np.array(same, bool).reshape(len(a), len(b))


@dataclass(frozen=True)
class TaskWork:
    """What a person did on one task.

    version: of the prediction that the annotation started from, "" where that is not known any more, None by hand;
    seconds: of labelling, as Label Studio measured; submitted: Unix seconds.
    """

    task: int
    version: str | None
    edits: Edits
    seconds: float | None
    submitted: float | None


@dataclass(frozen=True)
class Work:
    """What people did on the tasks of one version or of one round; `name` as in TaskWork.version, or of the round.

    seconds: the median over the tasks that Label Studio timed; a mean would count the coffee breaks. first and last:
    Unix seconds of the first and the last submission.
    """

    name: str | None
    tasks: int
    edits: Edits
    seconds: float | None
    first: float | None
    last: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON: the fields, with each count of edits, `predicted`, `final`, `edits` (in all), `acceptance`, `saved`."""
        counts = asdict(self.edits)
        derived = {name: getattr(self.edits, name) for name in ("predicted", "final", "acceptance", "saved")}
        return {**asdict(self), **counts, **derived, "edits": self.edits.total}


def summarise(tasks: Iterable[Mapping[str, Any]]) -> list[Work]:
    """Work by version, in the order of the first submissions; `tasks` with their annotations and predictions.

    A task counts under the version that its annotation started from, whatever was predicted for it since.
    """
    return _grouped(task_works(tasks), lambda work: work.version)


def works_by_round(works: Iterable[TaskWork], published: Sequence[tuple[float, str]]) -> list[Work]:
    """Work by round: what was submitted from the publication of a version to that of the next.

    published: Unix seconds and name of each version. Unlike `summarise` it shows the tasks that were labelled by hand
    while a version served. What was submitted before the first, or without a time, has the name None.
    """
    starts = sorted(published)

    def name(work: TaskWork) -> str | None:
        place = bisect_right([time for time, _ in starts], -math.inf if work.submitted is None else work.submitted)
        return starts[place - 1][1] if place else None

    return _grouped(works, name)


def task_works(tasks: Iterable[Mapping[str, Any]]) -> list[TaskWork]:
    """The work of each task that has an annotation which counts, see `choose_annotation`; skipped ones do not."""
    return [work for task in tasks if (work := task_work(task)) is not None]


def task_work(task: Mapping[str, Any]) -> TaskWork | None:
    """The work of one task; None where no annotation counts.

    A region with the ID of a predicted one is that one, and was touched where its `origin` says so or it differs. One
    whose origin is "manual" was drawn. The others are compared by `compare`. Only rectangles count. Fields that older
    versions of Label Studio lack, or scripts leave out, may be missing: without a parent prediction a task was done by
    hand, unless regions say that they were predicted; then what was removed is not known.
    """
    annotation = choose_annotation(task.get("annotations"))
    if annotation is None:
        return None
    final = _regions(annotation["result"])
    prediction = _prediction(task, annotation)
    if prediction is not None:
        version: str | None = str(prediction.get("model_version") or "")
        edits = _edits(_regions(prediction["result"]), final)
    else:
        origins = [region.origin for region in final]
        kept, moved = origins.count("prediction"), origins.count("prediction-changed")
        version = "" if kept + moved else None
        edits = Edits(kept=kept, moved=moved, added=len(final) - kept - moved)
    return TaskWork(
        int(task.get("id") or 0),
        version,
        edits,
        _seconds(annotation.get("lead_time")),
        _time(annotation.get("created_at") or annotation.get("updated_at")),
    )


class _Region(NamedTuple):
    id: str
    image: str  # the tag that it was drawn on
    label: tuple[str, ...]  # the tag that drew it, and its labels
    box: npt.NDArray[np.float32]
    origin: str


def _edits(predicted: Sequence[_Region], final: Sequence[_Region]) -> Edits:
    by_id = {region.id: region for region in predicted if region.id}
    edits, fresh = Edits(), []
    for region in final:
        before = by_id.pop(region.id, None)
        if before is None:
            fresh.append(region)
        elif region.label != before.label:
            edits += Edits(relabelled=1)
        elif region.origin == "prediction-changed":
            edits += Edits(moved=1)
        else:
            edits += _compare([before], [region])
    left = [region for region in predicted if not region.id or region.id in by_id]
    # Where Label Studio kept account, what was drawn by hand was drawn, even over a predicted box that was deleted.
    drawn = [region for region in fresh if region.origin == "manual"]
    fresh = [region for region in fresh if region.origin != "manual"]
    for image in dict.fromkeys(region.image for region in (*left, *fresh)):
        edits += _compare(*([region for region in side if region.image == image] for side in (left, fresh)))
    return edits + Edits(added=len(drawn))


def _compare(predicted: Sequence[_Region], final: Sequence[_Region]) -> Edits:
    before, after = (
        Boxes(np.array([region.box for region in side]).reshape(-1, 4), [region.label for region in side])
        for side in (predicted, final)
    )
    return compare(before, after)


def _prediction(task: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The prediction that an annotation started from: among the task's, or the copy that older versions keep in it."""
    parent = annotation.get("parent_prediction")
    candidates = [p for p in task.get("predictions") or () if isinstance(p, Mapping)]
    found = [p for p in candidates if parent is not None and p.get("id") == parent]
    if isinstance(copy := annotation.get("prediction"), Mapping):
        found.append(copy)
    return next((p for p in found if isinstance(p.get("result"), list)), None)


def _regions(result: Sequence[Any]) -> list[_Region]:
    found = []
    for region in result:
        value = region.get("value") if isinstance(region, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(names := value.get("rectanglelabels"), list) or not names:
            continue
        from_name, to_name = str(region.get("from_name", "")), str(region.get("to_name", ""))
        sides = [region.get(key) for key in ("original_width", "original_height")]
        known = all(isinstance(side, int | float) and side > 1 for side in sides)
        label = tuple(str(name) for name in names)
        one = {**region, "from_name": from_name, "to_name": to_name, "type": "rectanglelabels"}
        one["value"] = {**value, "rectanglelabels": [label[0]]}
        control = _control(from_name, to_name, label[0])
        boxes, _ = boxes_from_annotation([one], control, *(sides if known else (_CANVAS, _CANVAS)))
        for box in boxes:
            scale = np.array([sides[0], sides[1]] * 2 if known else [_CANVAS] * 4)
            origin = str(region.get("origin") or "")
            found.append(_Region(str(region.get("id") or ""), to_name, (from_name, *label), box / scale, origin))
    return found


@functools.lru_cache(256)
def _control(from_name: str, to_name: str, label: str) -> Control:
    return Control(from_name, to_name, "", (label,))


def _grouped(works: Iterable[TaskWork], name: Callable[[TaskWork], str | None]) -> list[Work]:
    groups: dict[str | None, list[TaskWork]] = {}
    for work in works:
        groups.setdefault(name(work), []).append(work)
    rows = []
    for group, members in groups.items():
        seconds = [work.seconds for work in members if work.seconds is not None]
        times = [work.submitted for work in members if work.submitted is not None]
        rows.append(
            Work(
                group,
                len(members),
                sum((work.edits for work in members), Edits()),
                statistics.median(seconds) if seconds else None,
                min(times, default=None),
                max(times, default=None),
            )
        )
    return sorted(rows, key=lambda row: -math.inf if row.first is None else row.first)


def _seconds(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if usable else None


def _time(value: Any) -> float | None:
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
