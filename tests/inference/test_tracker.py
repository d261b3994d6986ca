"""Tracks keep their number through crossings, gaps and faint frames; the assignment beneath is exact."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolonas.inference.assignment import assign
from yolonas.inference.detections import Detections
from yolonas.inference.tracker import Tracker


@given(st.integers(0, 7), st.integers(0, 7), st.integers(0, 10_000), st.booleans(), st.floats(0.1, 1.5))
def test_the_assignment_costs_as_little_as_scipys(n: int, m: int, seed: int, ties: bool, limit: float) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    cost = rng.integers(0, 4, (n, m)) / 4.0 if ties else rng.random((n, m))
    cost[rng.random((n, m)) < 0.2] = np.inf
    rows, columns = assign(cost, limit)
    assert len(set(rows)) == len(rows) == len(set(columns)) == len(columns)
    assert rows.tolist() == sorted(rows)
    assert (cost[rows, columns] < limit).all()
    gain = np.minimum(cost, limit) - limit
    expected = gain[optimize.linear_sum_assignment(gain)].sum()
    assert (cost[rows, columns] - limit).sum() == pytest.approx(expected, abs=1e-9)


def test_the_assignment_prefers_the_sum_to_the_single_best() -> None:
    rows, columns = assign(np.array([[0.1, 0.2], [0.3, 0.9]]), 1.0)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
    rows, columns = assign(np.array([[0.1, 0.2], [0.3, 0.9]]), 0.25)
    assert (rows.tolist(), columns.tolist()) == ([0], [0])


Box = tuple[float, float, float, float]


def frame(boxes: Iterable[Box], scores: object = 0.9, labels: object = 0, index: int | None = None) -> Detections:
    found = np.array(list(boxes), np.float64).reshape(-1, 4)
    scores, labels = (np.broadcast_to(np.asarray(value), len(found)) for value in (scores, labels))
    return Detections(found, scores, labels, ("cat", "dog"), (480, 640), frame=index)


def around(x: float, y: float, width: float = 40, height: float = 80) -> Box:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def ids(detections: Detections) -> list[int]:
    assert detections.track_ids is not None
    return detections.track_ids.tolist()


def test_numbers_start_at_one_and_stay() -> None:
    tracker = Tracker()
    assert ids(tracker.update(frame([around(100, 100), around(300, 100)]))) == [1, 2]
    found = tracker.update(frame([around(303, 100), around(104, 101)]))
    assert ids(found) == [2, 1]
    np.testing.assert_array_equal(found.boxes, frame([around(303, 100), around(104, 101)]).boxes)
    assert ids(tracker.update(frame([]))) == []
    assert ids(tracker.update(frame([around(112, 103)]))) == [1]


def test_a_new_object_gets_a_new_number_in_its_second_frame() -> None:
    tracker = Tracker()
    tracker.update(frame([around(100, 100)]))
    assert ids(tracker.update(frame([around(100, 100), around(300, 300)]))) == [1]
    assert ids(tracker.update(frame([around(100, 100), around(302, 300)]))) == [1, 2]
    assert ids(tracker.update(frame([around(500, 300)]))) == [], "a box of one frame is no track"
    assert ids(tracker.update(frame([around(100, 100), around(50, 400)]))) == [1]
    assert ids(tracker.update(frame([around(100, 100), around(50, 400)]))) == [1, 3], "and took no number"


def test_crossing_objects_keep_their_numbers() -> None:
    """Two that pass each other, with overlapping boxes: motion tells them apart where overlap alone does not."""
    tracker = Tracker()
    numbers = set()
    for t in range(60):
        boxes = [around(100 + 5 * t, 200), around(400 - 5 * t, 215)]
        order = [0, 1] if t % 2 else [1, 0]
        found = ids(tracker.update(frame([boxes[i] for i in order])))
        if len(found) == 2:
            numbers.add(tuple(found[order.index(i)] for i in (0, 1)))
    assert len(numbers) == 1
    assert sorted(numbers.pop()) == [1, 2]


def test_an_occlusion_keeps_the_number_until_max_lost() -> None:
    for hidden, expected in ((12, [1]), (15, [1]), (16, [])):  # frames without it
        tracker = Tracker(max_lost=15)
        for t in range(20):
            tracker.update(frame([around(60 + 4 * t, 200)]))
        for _ in range(hidden):
            assert ids(tracker.update(frame([]))) == []
        again = tracker.update(frame([around(60 + 4 * (20 + hidden), 200)]))
        assert ids(again) == expected, f"after {hidden} frames"


def test_faint_boxes_continue_a_track_and_start_none() -> None:
    def scores(low: float) -> list[list[int]]:
        tracker = Tracker(low=low)
        seen = []
        for t in range(30):
            faint = 10 <= t < 25
            boxes = [around(100 + 3 * t, 100), around(300, 300)]
            seen.append(ids(tracker.update(frame(boxes, [0.15 if faint else 0.8, 0.2]))))
        return seen

    assert scores(low=0.1) == [[1]] * 30
    without = scores(low=0.25)
    assert without[12] == [], "the second stage is what keeps it"
    tracker = Tracker()
    for _ in range(3):
        assert ids(tracker.update(frame([around(9, 9)], 0.25))) == [], "a score must be higher"


def test_a_track_has_one_class() -> None:
    tracker = Tracker()
    tracker.update(frame([around(100, 100), around(100, 100)], labels=[0, 1]))
    found = tracker.update(frame([around(101, 100), around(100, 100)], labels=[1, 0]))
    assert ids(found) == [2, 1]
    assert ids(tracker.update(frame([around(101, 100)], labels=1))) == [2]


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_left_out_frames_count_as_time(stride: int) -> None:
    """At 12 px per frame and every fifth frame boxes of 40 px do not touch those before: the motion must be scaled."""
    tracker = Tracker()
    numbers: list[int] = []
    for t in (*range(8), *range(8, 60, stride)):
        numbers += ids(tracker.update(frame([around(20 + 10 * t, 200)], index=t)))
    assert set(numbers) == {1}
    with pytest.raises(ValueError, match="frame 3 comes after frame"):
        tracker.update(frame([], index=3))


def test_numbers_hold_in_a_crowd() -> None:
    """20 objects with jittered boxes, faint and missing at times: hardly ever does one change its number."""
    rng = np.random.default_rng(0)
    start, speed = rng.uniform([40, 60], [600, 420], (20, 2)), rng.normal(0, 1.5, (20, 2))
    tracker = Tracker()
    number_of: dict[int, int] = {}
    switches = seen = present = 0
    for t in range(200):
        centres = start + speed * t
        shown = np.flatnonzero(rng.random(20) > 0.1)
        shown = shown[((centres[shown] > 30) & (centres[shown] < [610, 450])).all(1)]
        rng.shuffle(shown)
        boxes = [
            around(*(centres[i] + rng.normal(0, 1.5, 2)), *(np.array([40, 60]) + rng.normal(0, 2, 2))) for i in shown
        ]
        scores = np.where(rng.random(len(shown)) < 0.15, 0.15, 0.7)
        found = tracker.update(frame(boxes, scores, index=t))
        present += len(shown)
        truth = {tuple(np.float32(box).tolist()): i for box, i in zip(boxes, shown, strict=True)}
        for d in found:
            i = truth[tuple(d.box.tolist())]
            switches += i in number_of and number_of[i] != d.track_id
            number_of[i] = d.track_id or 0
            seen += 1
    assert seen > 0.97 * present, f"{seen} of {present}"
    assert switches <= 6, f"{switches} in {seen} boxes"


def test_nothing_at_all() -> None:
    tracker = Tracker()
    for _ in range(3):
        found = tracker.update(frame([]))
        assert (len(found), ids(found)) == (0, [])
    tracker.update(frame([(5, 5, 5, 5)]))
    assert len(tracker.update(frame([(5, 5, 5, 5)]))) == 0, "a box without area overlaps nothing"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5}, "low and high must be scores, low the lesser, not 0.5 and 0.25"),
        ({"high": 1.5}, "not 0.1 and 1.5"),
        ({"iou": 0}, "iou must lie between 0 and 1, not 0"),
        ({"max_lost": -1}, "max_lost must be at least 0 frames, not -1"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tracker(**options)  # type: ignore[arg-type]
