"""The task's score: by each strategy, in words, remembered over restarts, and never at the cost of a prediction."""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labelstudio_backend import signal_store
from labelstudio_backend.acquisition import (
    Acquisition,
    by_chance,
    of_control,
    of_task,
    older_regions,
    reasons,
    regions_disagreement,
)
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.signal_store import SignalStore
from labelstudio_backend.version import Version
from yolonas.active_learning import BACKGROUND, STRATEGIES, ImageSignals, class_doubt, values
from yolonas.inference.detections import Detections
from yolonas.labelstudio import LabelMap

LABELS = ("Car", "Van", "Bus")


def signals(
    scores: Sequence[float] = (),
    labels: Sequence[int] | None = None,
    rivals: dict[int, float] | None = None,
    feature: Sequence[float] = (0.0, 0.0),
    spread: float = 0.0,
) -> ImageSignals:
    """An image with these boxes; `rivals` gives class -> score of what else they may be."""
    own = np.array([0] * len(scores) if labels is None else labels, np.int64)
    logits = np.full((len(scores), len(LABELS)), -12.0)
    for label, score in (rivals or {}).items():
        logits[:, label] = np.log(score / (1 - score))
    logits[np.arange(len(scores)), own] = [np.log(score / (1 - score)) for score in scores]
    margins, entropies, others = class_doubt(logits, own)
    spreads = np.full(len(scores), spread)
    return ImageSignals(np.array(scores, float), own, margins, entropies, others, spreads, np.array(feature, float))


def region(x: float, label: str = "Car", score: float | None = 0.9, width: float = 20) -> dict[str, Any]:
    value = {"x": x, "y": 10, "width": width, "height": 20, "rotation": 0, "rectanglelabels": [label]}
    return {"from_name": "label", "to_name": "image", "type": "rectanglelabels", "score": score, "value": value}


@pytest.fixture
def project(tmp_path: Path) -> ProjectRegistry:
    project = Registry(tmp_path).register("http://localhost:8080", "5.1795289898", "<View/>")
    project.ensure_start("yolo_nas_s_coco", LABELS)
    return project


def version_of(project: ProjectRegistry, number: int = 1, learnt: Sequence[int] = ()) -> Version:
    record = {"manifest": {str(task): "1@now" for task in learnt}}
    return Version(f"yolonas-5-abc-v{number}", number, project.key, project.path, record)


def scores(
    acquisition: Acquisition,
    project: ProjectRegistry,
    version: Version,
    images: dict[int, ImageSignals],
    regions: dict[int, list[dict[str, Any]]] | None = None,
    older: dict[int, list[dict[str, Any]]] | None = None,
) -> dict[int, float]:
    """Scores by task id of one request."""
    ids = list(images)
    tasks: dict[int, dict[str, Any]] = {}
    for key, task in enumerate(ids):
        predictions = [{"id": 1, "model_version": "older", "result": older[task]}] if task in (older or {}) else []
        tasks[key] = {"id": task, "predictions": predictions}
    drawn = {key: (regions or {}).get(task, []) for key, task in enumerate(ids)}
    given = acquisition.task_scores(
        project, version, LABELS, tasks, drawn, {key: [images[task]] for key, task in enumerate(ids)}
    )
    assert all(0 <= score <= 1 for score in given.values())
    return {ids[key]: score for key, score in given.items()}


# -- scores


def test_the_doubtful_task_has_the_lowest_score_and_the_empty_one_stands_between(project: ProjectRegistry) -> None:
    images = {1: signals([0.98]), 2: signals([0.5]), 3: signals()}
    for strategy in ("uncertainty", "mix"):
        given = scores(Acquisition(strategy), project, version_of(project), images)
        assert given[2] < given[3] < given[1], strategy


def test_a_rare_class_goes_first_by_balance(project: ProjectRegistry) -> None:
    acquisition, version = Acquisition("balance"), version_of(project, learnt=[1, 2])
    scores(acquisition, project, version, {1: signals([0.9] * 9), 2: signals([0.9], [1])})
    given = scores(acquisition, project, version, {3: signals([0.9]), 4: signals([0.9], [2]), 5: signals([0.9], [1])})
    assert given[4] < given[5] < given[3]


def test_what_is_like_nothing_that_was_learnt_goes_first_by_diversity(project: ProjectRegistry) -> None:
    acquisition, version = Acquisition("diversity"), version_of(project, learnt=[1])
    scores(acquisition, project, version, {1: signals(feature=(0, 0)), 2: signals(feature=(5, 5))})
    alone = {
        task: scores(acquisition, project, version, {task: signals(feature=f)})[task]
        for task, f in ((3, (0.1, 0.0)), (4, (4.0, 4.0)), (5, (2.0, 2.0)))
    }
    assert alone[4] < alone[5] < alone[3]


def test_versions_that_disagree_bring_a_task_forward(project: ProjectRegistry) -> None:
    images = {1: signals([0.9]), 2: signals([0.9]), 3: signals([0.9])}
    regions = {task: [region(10)] for task in images}
    older = {1: [region(10)], 2: [region(70)], 3: [region(14)]}
    for strategy in ("disagreement", "mix"):
        given = scores(Acquisition(strategy), project, version_of(project), images, regions, older)
        assert given[2] < given[3] < given[1], strategy


def test_random_scores_stay_as_they_are_and_change_with_the_version(project: ProjectRegistry) -> None:
    images = {task: signals([0.9]) for task in range(50)}
    first = scores(Acquisition("random"), project, version_of(project), images)
    assert first == scores(Acquisition("random"), project, version_of(project), images)
    other = scores(Acquisition("random"), project, version_of(project, 2), images)
    assert sorted(first, key=first.__getitem__) != sorted(other, key=other.__getitem__)
    assert first[7] == by_chance(version_of(project).name, 7)
    assert 0.3 < np.mean(list(first.values())) < 0.7


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_to_score(project: ProjectRegistry, strategy: str) -> None:
    assert scores(Acquisition(strategy), project, version_of(project), {}) == {}


def test_a_failure_costs_the_place_and_not_the_prediction(
    project: ProjectRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("labelstudio_backend.acquisition.values", None)
    with caplog.at_level(logging.ERROR):
        given = scores(
            Acquisition("mix"), project, version_of(project), {1: signals([0.9]), 2: signals()}, {1: [region(10)]}
        )
    assert given == {1: pytest.approx(0.8), 2: 0.5}
    assert "by their boxes' scores alone" in caplog.text


def test_tasks_without_a_number_are_scored_and_not_remembered(project: ProjectRegistry) -> None:
    acquisition = Acquisition("mix")
    given = acquisition.task_scores(
        project, version_of(project), LABELS, {0: {"data": {}}}, {0: []}, {0: [signals([0.7])]}
    )
    assert list(given) == [0]
    assert SignalStore(project.path, version_of(project).name, LABELS).tasks() == {}


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "random"])
def test_scores_are_what_the_last_tasks_make_of_them(
    project: ProjectRegistry, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setattr("labelstudio_backend.acquisition.REFERENCE", 6)
    acquisition, version = Acquisition(strategy), version_of(project, learnt=range(0, 40, 3))
    rng = np.random.default_rng(0)

    def anything() -> ImageSignals:
        count = int(rng.integers(0, 4))
        found = signals(rng.uniform(0.1, 0.9, count), rng.integers(0, 3, count), feature=rng.normal(size=2))
        return dataclasses.replace(found, disagreement=float(rng.random()) if rng.random() < 0.5 else None)

    known: dict[int, ImageSignals] = {}
    for _ in range(30):
        images = {int(task): anything() for task in rng.choice(40, 3, replace=False)}
        given = scores(acquisition, project, version, images)
        known = {task: s for task, s in known.items() if task not in images}
        labelled = [s for task, s in known.items() if task % 3 == 0][-6:]
        others = [s for task, s in known.items() if task % 3 != 0][-6:]
        worth = values([*images.values(), *others], labelled, strategy)[:3]
        assert list(given.values()) == pytest.approx((1 - worth).tolist(), abs=1e-9)
        known |= images


def test_a_request_costs_the_same_however_many_tasks_the_project_has(
    project: ProjectRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelstudio_backend.acquisition.REFERENCE", 20)
    version = version_of(project, learnt=range(0, 400, 2))
    SignalStore(project.path, version.name, LABELS).add({task: signals([0.9]) for task in range(400)})
    reads, compared, copies = [], [], []
    monkeypatch.setattr(SignalStore, "_read", lambda self, read=SignalStore._read: reads.append(self) or read(self))
    monkeypatch.setattr(SignalStore, "tasks", copies.append)

    def counted(found: Any, labelled: Any, strategy: str, *, others: Any, **more: Any) -> Any:
        compared.append((len(found), len(labelled), len(others)))
        return values(found, labelled, strategy, others=others, **more)

    monkeypatch.setattr("labelstudio_backend.acquisition.values", counted)
    acquisition = Acquisition("mix")
    for task in (1, 2, 500, 501):
        scores(acquisition, project, version, {task: signals([0.5])})
    assert compared == [(1, 20, 20)] * 4
    assert (len(reads), copies) == (1, [])


def test_reading_what_is_known_of_one_project_holds_up_no_other(
    project: ProjectRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Registry(tmp_path).register("http://localhost:8080", "6.1795289898", "<View/>")
    read, begun, go_on = SignalStore._read, threading.Event(), threading.Event()

    def slow(self: SignalStore) -> Any:
        if self._folder.is_relative_to(project.path):
            begun.set()
            assert go_on.wait(30)
        return read(self)

    monkeypatch.setattr(SignalStore, "_read", slow)
    acquisition, version = Acquisition("mix"), version_of(project)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(scores, acquisition, project, version, {1: signals([0.9])})
        try:
            assert begun.wait(30)
            assert scores(acquisition, other, version, {1: signals([0.9])})
            assert not waiting.done()
        finally:
            go_on.set()
        assert waiting.result(30)


def test_only_the_projects_asked_last_are_in_memory(
    project: ProjectRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labelstudio_backend.acquisition.PROJECTS", 2)
    acquisition = Acquisition("mix")
    projects = [Registry(tmp_path).register("http://localhost:8080", f"{n}.1795289898", "<View/>") for n in range(3)]
    stores = [weakref.ref(acquisition._store(one, version_of(one), LABELS)) for one in projects]
    assert acquisition._store(projects[1], version_of(projects[1]), LABELS) is stores[1]()
    newer = acquisition._store(projects[1], version_of(projects[1], 2), LABELS)
    gc.collect()
    assert [store() is None for store in stores] == [True, True, False]
    assert newer.version == version_of(project, 2).name


# -- what goes into them


def test_a_control_takes_its_labels_above_its_threshold() -> None:
    found = Detections(
        np.array([[0, 0, 9, 9]] * 4), [0.9, 0.8, 0.7, 0.2], [2, 0, 1, 2], ("van", "person", "car"), (10, 10)
    )
    found.signals = ImageSignals(
        found.scores, found.labels, np.ones(4), np.zeros(4), np.array([0, 1, 2, 0]), np.zeros(4), np.zeros(1)
    )
    mapped = of_control(found, LabelMap({2: "Car", 0: "Van"}, ()), LABELS, score_threshold=0.25)
    assert mapped.labels.tolist() == [0, 1]
    assert mapped.rivals.tolist() == [1, BACKGROUND]  # a person has no label
    assert len(of_control(found, LabelMap({}, LABELS), LABELS, score_threshold=0.25)) == 0


def test_a_task_of_two_images_has_the_boxes_of_both() -> None:
    both = of_task([signals([0.9], feature=(0, 2)), signals([0.5, 0.6], [1, 2], feature=(2, 2))])
    assert (both.labels.tolist(), both.feature.tolist()) == ([0, 1, 2], [1, 2])
    assert np.isfinite(both.spreads).all()
    assert both.disagreement is None
    two_models = of_task([dataclasses.replace(signals(), disagreement=0.25), signals(feature=(3, 4, 5)), signals()])
    assert (two_models.feature.tolist(), two_models.disagreement) == ([0, 0, 3, 4, 5], 0.25)


def test_regions_are_compared_in_percent_and_by_control() -> None:
    assert regions_disagreement([region(10)], [region(10)]) == pytest.approx(0)
    assert regions_disagreement([region(10)], [region(10, "Van")]) == 1
    assert regions_disagreement([], []) == 0
    assert regions_disagreement([region(10)], []) == 1
    other = region(10) | {"to_name": "second image"}
    assert regions_disagreement([region(10)], [other]) == 1
    assert regions_disagreement([region(10, score=None)], [region(10, score=1.0)]) == pytest.approx(0)
    assert regions_disagreement([region(10), {"type": "choices", "value": {"choices": ["a"]}}], [region(10)]) < 1e-6


def test_the_latest_prediction_of_another_version_is_compared_with() -> None:
    predictions = [
        {"id": 3, "model_version": "v1", "result": [region(30)]},
        {"id": 9, "model_version": "v2", "result": []},
        {"id": 7, "model_version": "v1", "result": [region(70)]},
        {"id": 8, "model_version": "v1", "result": None},
        "nonsense",
    ]
    assert older_regions(predictions, "v2") == [region(70)]
    assert older_regions([predictions[1]], "v2") is None
    assert older_regions(None, "v2") is None
    assert older_regions(7, "v2") is None


# -- reasons


def test_reasons_in_words() -> None:
    images = [
        signals([0.6], [0], {1: 0.55}),
        signals([0.45]),
        signals([0.97], spread=0.6),
        signals([0.97]),
        signals(),
        signals([0.97]),
    ]
    words = reasons(images, [signals().labelled_as([0])], "uncertainty", LABELS)
    assert words[:3] == ["unsure between Car and Van", "unsure of a Car", "unsure where a Car ends"]
    assert words[4] == "no box found"


def test_reasons_of_the_other_strategies() -> None:
    known = [signals(feature=(0, 0)).labelled_as([0] * 20 + [1])]
    images = [signals([0.97]), signals([0.97], [2]), signals([0.97], feature=(9, 9)), signals([0.97])]
    assert reasons(images, known, "balance", LABELS)[1] == "rare class: Bus"
    assert reasons(images, known, "diversity", LABELS)[2] == "unlike what is labelled"
    assert reasons(images, [], "diversity", LABELS)[0] == "typical of the project"
    assert reasons(images, known, "random", LABELS) == ["by chance"] * 4
    mixed = reasons(images, known, "mix", LABELS)
    assert mixed[1].startswith("rare class: Bus")
    assert mixed[2].startswith("unlike what is labelled")
    assert reasons([], known, "mix", LABELS) == []


def test_the_more_that_versions_disagree_the_more_it_is_a_reason() -> None:
    images = [dataclasses.replace(signals([0.97]), disagreement=d) for d in (0.0, 0.9, 0.0)]
    assert "versions disagree" in reasons(images, [], "mix", LABELS)[1]
    assert reasons(images, [], "disagreement", LABELS)[1] == "versions disagree"


# -- the store


def test_signals_outlive_the_process_and_a_changed_label_config(tmp_path: Path) -> None:
    first = signals([0.9, 0.6, 0.4], [0, 2, 1], {1: 0.3}, feature=(1.5, -2.0), spread=0.25)
    store = SignalStore(tmp_path, "v1", LABELS)
    store.add({7: first, 8: signals()})
    again = SignalStore(tmp_path, "v1", LABELS).tasks()
    assert list(again) == [7, 8]
    for name in ("scores", "margins", "entropies", "spreads", "labels", "rivals", "feature"):
        np.testing.assert_allclose(getattr(again[7], name), getattr(first, name), atol=1e-3)
    assert len(again[8]) == 0
    changed = SignalStore(tmp_path, "v1", ("Bus", "Car")).tasks()[7]
    assert changed.labels.tolist() == [1, 0]  # the Van is gone
    assert changed.rivals.tolist() == [BACKGROUND, BACKGROUND]
    assert SignalStore(tmp_path, "v2", LABELS).tasks() == {}


def test_the_last_line_of_a_task_counts_and_an_equal_one_is_not_written(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, "v1", LABELS)
    store.add({7: signals([0.9])})
    (file,) = tmp_path.rglob("*.jsonl")
    size = file.stat().st_size
    store.add({7: signals([0.9])})
    assert file.stat().st_size == size
    store.add({7: signals([0.5])})
    assert SignalStore(tmp_path, "v1", LABELS).tasks()[7].scores[0] == pytest.approx(0.5)


def test_what_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    store = SignalStore(tmp_path, "v1", LABELS)
    store.add({7: signals([0.9]), 8: signals([0.8])})
    (file,) = tmp_path.rglob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-9])
    assert list(SignalStore(tmp_path, "v1", LABELS).tasks()) == [7]
    store.add({9: signals([0.7])})
    assert list(SignalStore(tmp_path, "v1", LABELS).tasks()) == [7, 9]


def test_other_processes_are_read(tmp_path: Path) -> None:
    SignalStore(tmp_path, "v1", LABELS).add({7: signals([0.9])})
    (file,) = tmp_path.rglob("*.jsonl")
    file.rename(file.with_name("elsewhere-1.jsonl"))
    store = SignalStore(tmp_path, "v1", LABELS)
    store.add({8: signals([0.8])})
    assert sorted(SignalStore(tmp_path, "v1", LABELS).tasks()) == [7, 8]


def test_the_last_versions_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    for number in range(1, 7):
        store = SignalStore(tmp_path, f"v{number}", LABELS)
        store.add({7: signals([0.9])})
        os.utime(tmp_path / "signals" / f"v{number}", (number, number))
    assert sorted(path.name for path in (tmp_path / "signals").iterdir()) == ["v3", "v4", "v5", "v6"]
    SignalStore(tmp_path, "v1", LABELS)  # reading changes nothing
    assert sorted(path.name for path in (tmp_path / "signals").iterdir()) == ["v3", "v4", "v5", "v6"]
    store.add({8: signals([0.9])})
    assert sorted(SignalStore(tmp_path, "v6", LABELS).tasks()) == [7, 8]


def test_the_store_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_store, "MOST_TASKS", 3)
    monkeypatch.setattr(signal_store, "MOST_BYTES", 2000)
    store = SignalStore(tmp_path, "v1", LABELS)
    for task in range(40):
        store.add({task: signals([0.9])})
    assert list(store.tasks()) == [37, 38, 39]
    (file,) = tmp_path.rglob("*.jsonl")
    assert file.stat().st_size < 3000


def test_a_full_disk_is_a_line_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "signals").write_text("in the way")
    store = SignalStore(tmp_path, "v1", LABELS)
    store.add({7: signals([0.9])})
    assert list(store.tasks()) == [7]
    assert "could not be written" in caplog.text


def test_a_restarted_server_goes_on_with_what_is_known(project: ProjectRegistry) -> None:
    version = version_of(project, learnt=[1])
    scores(Acquisition("diversity"), project, version, {1: signals(feature=(0, 0)), 2: signals(feature=(5, 5))})
    near = scores(Acquisition("diversity"), project, version, {3: signals(feature=(0.1, 0))})[3]
    far = scores(Acquisition("diversity"), project, version, {4: signals(feature=(4, 4))})[4]
    assert far < near


def test_features_of_another_length_are_not_compared(project: ProjectRegistry) -> None:
    acquisition, version = Acquisition("mix"), version_of(project, learnt=[1])
    scores(acquisition, project, version, {1: signals([0.9]), 2: signals([0.9])})
    given = scores(
        acquisition, project, version, {3: signals([0.9], feature=(1, 2, 3)), 4: signals([0.5], feature=(1, 2, 3))}
    )
    assert given[4] < given[3]
