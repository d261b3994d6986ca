"""The work that predictions save, counted on cases made by hand, by brute force, and on a real annotation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelstudio_backend.acceptance import (
    NEAR_IOU,
    SAME_IOU,
    Boxes,
    Edits,
    compare,
    fewest_edits_threshold,
    pair,
    summarise,
    task_work,
    task_works,
    works_by_round,
)
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.evaluation import overlaps
from yolonas.inference.detections import Detections

REQUESTS = json.loads((Path(__file__).parent / "label_studio_requests.json").read_text())


def boxes(*rows: tuple[float, float, float, float, str]) -> Boxes:
    return Boxes(np.array([row[:4] for row in rows], np.float32).reshape(-1, 4), [row[4] for row in rows])


# -- boxes -------------------------------------------------------------------------------------------------------------

CELL = (10.0, 10.0, 20.0, 20.0)


@pytest.mark.parametrize(
    ("predicted", "final", "edits"),
    [
        ([], [], Edits()),
        ([], [(*CELL, "a"), (30, 30, 40, 40, "b")], Edits(added=2)),
        ([(*CELL, "a")], [], Edits(removed=1)),
        ([(*CELL, "a")], [(*CELL, "a")], Edits(kept=1)),
        ([(*CELL, "a")], [(*CELL, "b")], Edits(relabelled=1)),
        ([(*CELL, "a")], [(50, 50, 60, 60, "a")], Edits(removed=1, added=1)),
        # of 10 x 10, 2 px to the right: 80 / 120 = 0.67; 1 px: 90 / 110 = 0.82
        ([(*CELL, "a")], [(12, 10, 22, 20, "a")], Edits(moved=1)),
        ([(*CELL, "a")], [(11, 10, 21, 20, "a")], Edits(kept=1)),
        # exactly 0.7: a box that holds 70 % of another
        ([(10, 10, 20, 20, "a")], [(10, 10, 17, 20, "a")], Edits(kept=1)),
        # 5 px: 50 / 150 = 0.33, near; 6 px: 40 / 160 = 0.25, another object
        ([(*CELL, "a")], [(15, 10, 25, 20, "a")], Edits(moved=1)),
        ([(*CELL, "a")], [(16, 10, 26, 20, "a")], Edits(removed=1, added=1)),
        # another class and another place is as much work as drawing it
        ([(*CELL, "a")], [(12, 10, 22, 20, "b")], Edits(removed=1, added=1)),
        # two on one object: one is kept
        ([(*CELL, "a"), (11, 10, 21, 20, "a")], [(*CELL, "a")], Edits(kept=1, removed=1)),
        # to relabel the one is as much work as to move the other: the one that overlaps more
        ([(*CELL, "b"), (12, 10, 22, 20, "a")], [(*CELL, "a")], Edits(relabelled=1, removed=1)),
    ],
)
def test_edits(predicted: list[Any], final: list[Any], edits: Edits) -> None:
    assert compare(boxes(*predicted), boxes(*final)) == edits


def test_pairs_are_the_best_for_all_boxes_together() -> None:
    # The first predicted box overlaps the first cell most (0.90, 0.82 the second one), the other one 0.74 and 0.54.
    # Greedily the first would take the first cell, and the other one had to be moved.
    predicted = boxes((11, 10, 21, 20, "a"), (9, 10, 19, 20, "a"))
    final = boxes((10.5, 10, 20.5, 20, "a"), (12, 10, 22, 20, "a"))
    rows, columns = pair(predicted, final)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
    assert compare(predicted, final) == Edits(kept=2)


def test_any_unit_will_do() -> None:
    predicted, final = boxes((10, 10, 20, 20, "a")), boxes((12, 10, 22, 20, "a"))
    stretch = np.array([6.4, 0.01, 6.4, 0.01], np.float32)
    stretched = [Boxes(side.boxes * stretch, side.labels) for side in (predicted, final)]
    assert compare(*stretched) == compare(predicted, final) == Edits(moved=1)


corner = st.integers(0, 12)
one_box = st.tuples(corner, corner, st.integers(3, 8), st.integers(3, 8), st.sampled_from("ab")).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3], b[4])
)


@given(st.lists(one_box, max_size=4), st.lists(one_box, max_size=4))
def test_no_pairing_has_fewer_edits(predicted: list[Any], final: list[Any]) -> None:
    edits = compare(boxes(*predicted), boxes(*final))
    assert edits.predicted == len(predicted)
    assert edits.final == len(final)
    assert edits.total == fewest_edits(boxes(*predicted), boxes(*final))


def fewest_edits(predicted: Boxes, final: Boxes) -> int:
    """By trying every pairing."""
    iou = overlaps(predicted.boxes, final.boxes, np.zeros(len(final.labels), bool))
    n, m = iou.shape
    fewest = n + m
    for columns in itertools.permutations([*range(m), *[-1] * n], n):
        edits, free = 0, m
        for row, column in enumerate(columns):
            same = column >= 0 and predicted.labels[row] == final.labels[column]
            if column < 0 or iou[row, column] < (NEAR_IOU if same else SAME_IOU):
                edits += 1
            else:
                free -= 1
                edits += not same or iou[row, column] < SAME_IOU
        fewest = min(fewest, edits + free)
    return fewest


def test_shares() -> None:
    edits = Edits(kept=6, moved=1, relabelled=1, removed=2, added=4)
    assert (edits.predicted, edits.final, edits.total) == (10, 12, 8)
    assert edits.acceptance == 0.6
    assert edits.saved == pytest.approx(1 - 8 / 12)
    assert (Edits(added=3).acceptance, Edits(added=3).saved) == (None, 0.0)
    assert (Edits().acceptance, Edits().saved) == (None, None)
    assert edits + Edits(added=1) == Edits(6, 1, 1, 2, 5)


def test_threshold_with_the_fewest_edits() -> None:
    def image(*rows: tuple[float, float, float, float, str]) -> LabelledImage:
        side = boxes(*rows)
        labels = np.array(["ab".index(str(label)) for label in side.labels], np.int64)
        return LabelledImage(Path("x"), side.boxes, labels, np.zeros(len(labels), bool), 100, 100, 1)

    cells = [(10.0 * n, 10.0, 10.0 * n + 8, 18.0, "a") for n in range(4)]
    empty = [(10.0 * n, 50.0, 10.0 * n + 8, 58.0, "a") for n in range(4)]
    data = LabelledImages(("a", "b"), [image(*cells), image()])
    # Right at 0.9 0.8 0.6 0.3, wrong at 0.7 0.45 0.42 0.41: below 0.6 every right box costs three in vain.
    found = np.array([row[:4] for row in (*cells, *empty)])
    scores = np.array([0.9, 0.8, 0.6, 0.3, 0.7, 0.45, 0.42, 0.41])
    one = Detections(found, scores, np.zeros(8, int), ("a", "b"), (100, 100))
    none = Detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int), ("a", "b"), (100, 100))
    # Two edits from 0.45 to 0.575 (one in vain, one missing) and from 0.7 to 0.775 (two missing), more elsewhere.
    assert fewest_edits_threshold(data, [one, none]) == pytest.approx(0.575)
    # What is wrong everywhere is better not shown at all.
    wrong = Detections(found[4:], scores[:4], np.zeros(4, int), ("a", "b"), (100, 100))
    assert fewest_edits_threshold(data, [wrong, none]) >= 0.9


# -- tasks -------------------------------------------------------------------------------------------------------------


def region(name: str, x: float = 10, label: str = "Car", origin: str | None = None, **more: Any) -> dict[str, Any]:
    value = {"x": x, "y": 20, "width": 10, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    found = {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "value": value, **more}
    return found | ({"id": name} if name else {}) | ({"origin": origin} if origin else {})


def task(
    predicted: list[Any] | None, final: list[Any], number: int = 1, version: str = "v1", **values: Any
) -> dict[str, Any]:
    """A task labelled from a prediction of `version`, or by hand (None)."""
    predictions = [] if predicted is None else [{"id": 7, "model_version": version, "result": predicted}]
    newer = {"id": 8, "model_version": "v9", "result": [region("z", 60)]}
    annotation = {"id": 1, "result": final, "parent_prediction": 7 if predictions else None, **values}
    return {"id": number, "annotations": [annotation], "predictions": [newer, *predictions]}


def edits_of(task: dict[str, Any]) -> Edits:
    work = task_work(task)
    assert work is not None
    return work.edits


def test_a_real_annotation() -> None:
    """Of Label Studio 1.23.2: one box that was accepted as predicted, after 4 s."""
    body = next(
        request["request"]["body"]
        for request in REQUESTS
        if ((request["request"]["body"] or {}).get("annotation") or {}).get("parent_prediction")
    )
    accepted = body["annotation"]
    prediction = {"id": 8, "model_version": "dummy2", "result": [{**accepted["result"][0]}]}
    del prediction["result"][0]["origin"]
    work = task_work({**body["task"], "annotations": [accepted], "predictions": [prediction]})
    assert work is not None
    assert (work.task, work.version, work.edits, work.seconds) == (10, "dummy2", Edits(kept=1), 4.001)
    assert work.submitted == pytest.approx(1795290590.438006)
    # The prediction may have been deleted since.
    work = task_work({**body["task"], "annotations": [accepted], "predictions": []})
    assert work is not None
    assert (work.version, work.edits) == ("", Edits(kept=1))


def test_a_task_that_was_corrected_by_mouse() -> None:
    """Of Label Studio 1.23.2, by test_acceptance_by_mouse.py: regions keep the IDs of the predicted ones."""
    task = json.loads((Path(__file__).parent / "corrected_by_mouse.json").read_text())
    work = task_work(task)
    assert work is not None
    assert (work.version, work.seconds) == ("v1", 6.947)
    assert work.edits == Edits(kept=1, moved=1, relabelled=1, removed=1, added=1)
    # As far as boxes tell, the one that was moved far is another one.
    for region in task["annotations"][0]["result"]:
        del region["id"], region["origin"]
    assert edits_of(task) == Edits(kept=1, relabelled=1, removed=2, added=2)


def test_regions_are_followed_by_their_ids() -> None:
    predicted = [region(name, x) for name, x in (("a", 0), ("b", 20), ("c", 40), ("d", 60), ("e", 80))]
    final = [
        region("a", 0, origin="prediction"),
        region("b", 20.1, origin="prediction-changed"),  # hardly moved, but touched
        region("c", 40, "Person", origin="prediction-changed"),
        region("e", 70, origin="prediction-changed"),  # far away, and still the same box
        region("new", 60, origin="manual"),  # drawn where a predicted one was deleted
    ]
    assert edits_of(task(predicted, final)) == Edits(kept=1, moved=2, relabelled=1, removed=1, added=1)


def test_regions_without_ids_or_origin_are_compared() -> None:
    predicted = [region("", 0), region("", 20), region("", 40)]
    final = [region("x", 0), region("y", 22), region("z", 80)]  # IoU of the second 8 / 12
    assert edits_of(task(predicted, final)) == Edits(kept=1, moved=1, removed=1, added=1)


def test_a_region_that_kept_its_id_but_changed_without_saying_so() -> None:
    final = [region("a", 4), region("b", 20.5), region("c", 40, "Person")]
    assert edits_of(task([region("a", 0), region("b", 20), region("c", 40)], final)) == Edits(
        kept=1, moved=1, relabelled=1
    )


def test_boxes_on_different_images_of_a_task_never_pair() -> None:
    final = [region("", 0, to_name="other")]
    assert edits_of(task([region("", 0)], final)) == Edits(removed=1, added=1)


def test_by_hand_and_nothing_found() -> None:
    by_hand = task_work(task(None, [region("a"), region("b", 50)]))
    assert by_hand is not None
    assert (by_hand.version, by_hand.edits, by_hand.seconds, by_hand.submitted) == (None, Edits(added=2), None, None)
    found_nothing = task_work(task([], [region("a")]))
    assert found_nothing is not None
    assert (found_nothing.version, found_nothing.edits) == ("v1", Edits(added=1))


def test_the_copy_that_older_versions_keep_in_the_annotation() -> None:
    copy = {"model_version": "old", "result": [region("a")]}
    annotation = {"id": 1, "result": [region("a")], "prediction": copy}
    work = task_work({"id": 3, "annotations": [annotation]})
    assert work is not None
    assert (work.version, work.edits) == ("old", Edits(kept=1))


def test_what_is_no_rectangle_or_no_annotation_does_not_count() -> None:
    strange = [{"type": "choices", "value": {"choices": ["x"]}}, "text", {"value": None}, {"value": {}}]
    slip = region("s")
    slip["value"]["width"] = 0.001
    assert edits_of(task([region("a")], [region("a"), *strange, slip])) == Edits(kept=1)
    assert task_work({"id": 1, "annotations": [{"id": 1, "result": [], "was_cancelled": True}]}) is None
    assert task_work({"id": 1}) is None


def test_a_turned_box_counts_as_the_box_around_it() -> None:
    turned = region("a", original_width=200, original_height=100)
    turned["value"] |= {"x": 20, "rotation": 90}  # 20 x 20 px, about its top-left corner at (40, 20)
    assert edits_of(task([region("", 10)], [turned])) == Edits(kept=1)


def test_summaries() -> None:
    day = "2026-11-22T{}:00Z"
    tasks = [
        task([region("a"), region("b", 50)], [region("a")], 4, "v2", lead_time=50, created_at=day.format("10:30")),
        task(None, [region("a")], 1, lead_time=30, created_at=day.format("09:00")),
        task([region("a")], [region("a")], 2, "v1", lead_time=10, created_at=day.format("09:30")),
        task([region("a")], [], 3, "v1", lead_time=20, created_at=day.format("10:10")),
        task([region("a")], [region("a")], 5, "v1", lead_time="?", created_at=day.format("09:40")),
        {"id": 6, "annotations": []},
    ]
    works = summarise(tasks)
    assert [(work.name, work.tasks, work.edits, work.seconds) for work in works] == [
        (None, 1, Edits(added=1), 30.0),
        ("v1", 3, Edits(kept=2, removed=1), 15.0),
        ("v2", 1, Edits(kept=1, removed=1), 50.0),
    ]
    assert works[1].last is not None
    assert works[1].first is not None
    assert works[1].last - works[1].first == 40 * 60
    # v2 came at 10:00, when somebody still had a task of v1 open.
    nine, ten = (works[0].first or 0), (works[0].first or 0) + 3600
    by_round = works_by_round(task_works(tasks), [(ten, "v2"), (nine + 900, "v1")])
    assert [(work.name, work.tasks, work.edits) for work in by_round] == [
        (None, 1, Edits(added=1)),
        ("v1", 2, Edits(kept=2)),
        ("v2", 2, Edits(kept=1, removed=2)),
    ]
    row = works[1].to_dict()
    assert json.loads(json.dumps(row)) == row
    assert (row["name"], row["tasks"], row["edits"], row["removed"]) == ("v1", 3, 1, 1)
    assert row["acceptance"] == pytest.approx(2 / 3)
    assert summarise([]) == []
