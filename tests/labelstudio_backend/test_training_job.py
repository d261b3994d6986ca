from __future__ import annotations

import base64
import errno
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from labelstudio_backend import learnt, serving, training_job
from labelstudio_backend.corrections import corrections, held_out, manifest, new_since
from labelstudio_backend.gate import Verdict
from labelstudio_backend.job import STOPPED, Job
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.learnt import FEATURES
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import Version, load_checkpoint
from yolonas import checkpoint, labelstudio
from yolonas.active_learning import SIGNALS_CONF, ImageSignals
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import MissingPackageError
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.training import auto, trainer
from yolonas.training.auto import RATES_FROM_RANDOM
from yolonas.training.validation import Validation

UID = "5.1795289898"
SIDE = 64


def config(*labels: str) -> str:
    tags = "".join(f'<Label value="{label}"/>' for label in labels)
    return (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{tags}</RectangleLabels></View>'
    )


def task(number: int, *, boxes: int = 1, label: str = "Square") -> dict[str, Any]:
    """A white square on black, as a data: URL, with its annotation."""
    rng = np.random.default_rng(number)
    picture = rng.integers(0, 60, (SIDE, SIDE, 3)).astype(np.uint8)
    regions = []
    for _ in range(boxes):
        x, y = (int(v) for v in rng.integers(4, SIDE - 28, 2))
        picture[y : y + 24, x : x + 24] = 230
        value = {"x": x, "y": y, "width": 24, "height": 24, "rotation": 0, "rectanglelabels": [label]}
        value |= {key: value[key] * 100 / SIDE for key in ("x", "y", "width", "height")}
        regions.append({"type": "rectanglelabels", "from_name": "label", "to_name": "image", "value": value})
    png = base64.b64encode(cv2.imencode(".png", picture)[1].tobytes()).decode()
    annotation = {"id": number + 100, "result": regions, "updated_at": "2026-01-01T00:00:00Z"}
    return {"id": number, "data": {"image": f"data:image/png;base64,{png}"}, "annotations": [annotation]}


class FakeLabelStudio:
    url = "http://ls"

    def __init__(self) -> None:
        self.tasks: list[dict[str, Any]] = [task(n) for n in range(1, 13)]
        self.configs = [config("Square")]  # one is used up by each look, the last one stays
        self.away = False
        self.looks = 0

    def __enter__(self) -> FakeLabelStudio:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def get_project(self, project: int) -> dict[str, Any]:
        if self.away:
            raise LabelStudioError("no answer from Label Studio at http://ls")
        self.looks += 1
        xml = self.configs.pop(0) if len(self.configs) > 1 else self.configs[0]
        return {"id": 5, "created_at": "2026-11-21T19:38:18.810449Z", "label_config": xml}

    def iter_tasks(self, project: int, *, only_annotated: bool) -> Iterator[dict[str, Any]]:
        yield from self.tasks


class Bench:
    def __init__(self, folder: Path, studio: FakeLabelStudio) -> None:
        self.settings = Settings(
            state_dir=folder, train_minutes=0.02, image_size=SIDE, device="cpu", runtime="torch", precision="fp32"
        )
        self.studio = studio
        self.project: ProjectRegistry = Registry(folder / "projects").register("http://ls", UID, config("Square"))
        self.project.ensure_start("untrained-n", ["Square"])
        self.jobs = Jobs(folder / "jobs.sqlite")

    def begin(self) -> int:
        self.jobs.enqueue(self.project.key, "START_TRAINING")
        job = self.jobs.claim()
        assert job is not None
        return job.id

    def go_on(self, job_id: int, should_stop: Callable[[], bool] = lambda: False) -> tuple[int, Job]:
        code = training_job.run(job_id, self.settings, self.jobs, should_stop)
        job = self.jobs.get(job_id)
        assert job is not None
        return code, job

    def train(self) -> Job:
        return self.go_on(self.begin())[1]

    def split(self, numbers: range) -> tuple[list[int], list[int]]:
        test = [n for n in numbers if held_out(self.project.key, n, self.settings.held_out)]
        return [n for n in numbers if n not in test], test


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    studio = FakeLabelStudio()
    monkeypatch.setattr(training_job, "LabelStudio", lambda url, token: studio)
    monkeypatch.setattr(training_job, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(training_job, "AGAIN_SECONDS", 0.01)
    return Bench(tmp_path, studio)


def test_a_first_version_is_trained_published_and_written_down(bench: Bench) -> None:
    bench.studio.tasks.append(task(20, boxes=0))
    job = bench.train()
    assert (job.state, job.progress) == ("succeeded", 1.0)
    version = bench.project.current()
    assert (version.name, version.number, version.trained) == (job.version, 1, True)
    train, test = bench.split(range(1, 13))
    record = version.record
    assert record["base"].endswith("-v0")
    assert record["tasks"]["labelled"] == 13
    assert record["tasks"]["train_boxes"] == len(train)
    assert record["tasks"]["held_out_boxes"] == len(test)
    assert record["tasks"]["negatives"] == 1
    assert record["tasks"]["boxes_per_class"] == {"Square": 12}
    assert not (version.path / FEATURES).exists(), "by chance nothing is compared"
    assert {n for n, entry in record["manifest"].items() if entry["part"] == "train"} >= {str(n) for n in train}
    assert record["gate"]["decision"] == "published"
    assert not record["gate"]["measured"]
    assert set(record["after"]) == {"ap", "ap50", "per_class"}
    assert record["training"]["epochs"] >= 1
    assert job.manifest == {str(n): f"{n + 100}@2026-01-01T00:00:00Z" for n in [*range(1, 13), 20]}
    serving = Detector(version.weights, "cpu")
    assert serving.names == ("Square",)
    assert serving.checkpoint.conf == pytest.approx(record["training"]["threshold"], abs=1e-4)
    left = {path.name for path in bench.jobs.folder(job.id).rglob("*")}
    assert "results.csv" in left
    assert not left & {"images", "resume.pt", "model.safetensors", "best.safetensors"}, "a job does not fill the disk"


def test_where_scores_compare_images_the_version_knows_how_those_look_that_it_has_learned_from(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.settings = bench.settings.model_copy(update={"acquisition": "mix"})
    monkeypatch.setattr(learnt, "IMAGES", 5)
    assert bench.train().state == "succeeded"
    version = bench.project.current()
    found = [signals.feature for signals in learnt.learnt_images(version)]
    assert len(found) == 5
    first = task(bench.split(range(1, 13))[0][0])["data"]["image"]
    content = np.frombuffer(base64.b64decode(first.partition(",")[2]), np.uint8)
    picture = np.ascontiguousarray(cv2.imdecode(content, cv2.IMREAD_COLOR)[..., ::-1])
    (seen,) = Detector(version.weights, "cpu").predict_batch([picture], conf=SIGNALS_CONF, signals=True)
    np.testing.assert_allclose(found[0], ImageSignals.of(seen).feature, atol=1e-3)
    monkeypatch.setattr(learnt, "write_features", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(training_job, "judge", lambda *_, first: Verdict(True, False, "as good", 3))
    assert bench.train().state == "succeeded", "the order is not worth a version"
    assert not (bench.project.current().path / FEATURES).exists()


def test_a_version_that_the_gate_refuses_does_not_serve(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(load_checkpoint(bench.project.current()), bench.jobs.path.with_name("first.safetensors"))
    first = bench.project.publish(bench.jobs.path.with_name("first.safetensors"), {})
    judged: list[bool] = []

    def refuse(*_: object, first: bool) -> Verdict:
        judged.append(first)
        return Verdict(False, True, "AP50 0.9 -> 0.1", 25, 0.9, 0.1)

    monkeypatch.setattr(training_job, "judge", refuse)
    job = bench.train()
    assert (job.state, job.record["base"]) == ("refused", first.name)
    assert "AP50 0.9 -> 0.1" in job.reason
    assert judged == [False], "no first version any more"
    assert bench.project.current() == first
    assert job.record["gate"]["decision"] == "refused"
    assert job.record["training"]["recipe"]["lr"] < RATES_FROM_RANDOM["n"], "from trained weights"


def test_labels_that_vanished_are_dropped_and_labels_that_came_meanwhile_queue_another_training(bench: Bench) -> None:
    bench.studio.tasks += [task(n, label="Triangle") for n in range(30, 34)]
    bench.studio.configs = [config("Square"), config("Square", "Circle")]
    job = bench.train()
    assert job.state == "succeeded"
    assert job.record["labels"] == ["Square"]
    assert job.record["tasks"]["negatives"] == 4
    (queued,) = bench.jobs.find(states=("queued",))
    assert queued.trigger == "new labels in the label config: Circle"


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda studio, bench: studio.tasks.clear(), "no task is labelled yet"),
        (lambda studio, bench: setattr(studio, "tasks", [task(1, boxes=0), task(2, boxes=0)]), "there is no box"),
        (
            lambda studio, bench: setattr(studio, "tasks", [task(bench.split(range(99))[1][0])]),
            "label a few more tasks",
        ),
        (
            lambda studio, bench: [t["data"].update(image="http://elsewhere/a.png") for t in studio.tasks],
            "no image of the 12 labelled tasks can be had",
        ),
        (lambda studio, bench: setattr(studio, "configs", ["<View/>"]), "no RectangleLabels"),
        (lambda studio, bench: setattr(studio, "away", True), "no answer from Label Studio"),
    ],
)
def test_what_cannot_be_learnt_from_fails_with_a_sentence(
    bench: Bench, prepare: Callable[[FakeLabelStudio, Bench], None], reason: str
) -> None:
    prepare(bench.studio, bench)
    job = bench.train()
    assert job.state == "failed"
    assert reason in job.reason
    assert "Traceback" not in job.reason
    assert bench.project.current().number == 0


def failing(bench: Bench, monkeypatch: pytest.MonkeyPatch, number: int, error: MediaError, times: float) -> None:
    """Have the image of this task fail so often."""
    fetch, asked = MediaCache.fetch, iter(range(10**6))

    def failed(media: MediaCache, value: str, *, task_id: int, **options: Any) -> Path:
        if task_id == number and next(asked) < times:
            raise error
        return fetch(media, value, task_id=task_id, **options)

    monkeypatch.setattr(MediaCache, "fetch", failed)


def test_label_studio_and_an_image_that_are_away_are_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_job, "PATIENCE_SECONDS", 60.0)
    failing(bench, monkeypatch, 3, MediaError("3.png could not be fetched: ls answered 503", passing=True), 2)
    read = bench.studio.iter_tasks

    def broken_off(*arguments: Any, **options: Any) -> Iterator[dict[str, Any]]:
        monkeypatch.setattr(bench.studio, "iter_tasks", read)
        yield next(read(*arguments, **options))
        raise LabelStudioError("no answer from Label Studio")

    monkeypatch.setattr(bench.studio, "iter_tasks", broken_off)
    job = bench.train()
    assert job.state == "succeeded", job.reason
    assert (job.record["tasks"]["labelled"], job.record["tasks"]["unusable"]) == (12, 0)
    assert caplog.text.count("trying again") == 3


def test_an_image_that_stays_away_fails_the_training_and_thins_out_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(bench, monkeypatch, 3, MediaError("3.png could not be fetched: ls answered 503", passing=True), 10**6)
    job = bench.train()
    assert job.state == "failed"
    assert job.reason.startswith("task 3: 3.png could not be fetched: ls answered 503; nothing is learnt without it")
    assert bench.project.current().number == 0


def test_a_task_whose_image_is_gone_stands_in_the_manifest_as_unusable(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(bench, monkeypatch, 3, MediaError("3.png could not be fetched: ls answered 404"), 10**6)
    job = bench.train()
    assert job.state == "succeeded", job.reason
    parts = {number: entry["part"] for number, entry in bench.project.current().record["manifest"].items()}
    assert [number for number, part in parts.items() if part == "unusable"] == ["3"]
    assert len(parts) == 12
    assert job.record["tasks"]["unusable_because"] == ["task 3: 3.png could not be fetched: ls answered 404"]
    assert new_since(manifest(corrections(bench.studio.tasks)), job.manifest) == 0, "nothing to train for again"


def test_a_full_disk_leaves_the_old_version_serving(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    monkeypatch.setattr(checkpoint, "save", full)
    job = bench.train()
    assert job.state == "failed"
    assert job.reason.startswith("the disk is full (model.safetensors)")
    assert bench.project.current().number == 0


def test_a_stopped_job_goes_on_with_its_own_data_and_epochs(bench: Bench) -> None:
    job_id = bench.begin()
    folder = bench.jobs.folder(job_id)
    code, job = bench.go_on(job_id, lambda: (folder / "training" / "resume.pt").exists())
    assert (code, job.state) == (STOPPED, "running")
    assert bench.project.current().number == 0
    kept = json.loads((folder / "data.json").read_text())
    first_epoch = (folder / "training" / "results.csv").read_text().splitlines()[1]
    bench.studio.tasks = [task(50)]  # what is labelled meanwhile waits for the next job
    bench.settings = bench.settings.model_copy(update={"train_minutes": 0.1})
    code, job = bench.go_on(job_id)
    assert (code, job.state) == (0, "succeeded")
    version = bench.project.current()
    assert version.record["manifest"] == kept["manifest"]
    assert (folder / "training" / "results.csv").read_text().splitlines()[1] == first_epoch


def test_a_job_that_published_before_it_was_killed_is_not_run_twice(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.begin()
    (tmp_path / "weights").write_bytes(b"weights")
    version = bench.project.publish(tmp_path / "weights", {"job": job_id})
    code, job = bench.go_on(job_id)
    assert (code, job.state, job.version) == (0, "succeeded", version.name)
    assert bench.studio.looks == 0


def test_a_version_whose_publishing_was_cut_serves_after_the_restart(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.begin()
    (tmp_path / "weights").write_bytes(b"weights")
    version = bench.project.publish(tmp_path / "weights", {"job": job_id})
    (bench.project.path / "current").write_text('{"version": 0}')  # killed between the two renames
    _, job = bench.go_on(job_id)
    assert (job.state, bench.project.current()) == ("succeeded", version)


def test_predicted_values_serve_the_first_training_and_do_not_break_the_next(bench: Bench, tmp_path: Path) -> None:
    xml = config("Square").replace("/></Rect", ' predicted_values="bxo, Box"/></Rect')
    bench.studio.configs = [xml]
    start = tmp_path / "start.safetensors"
    checkpoint.save(checkpoint.Checkpoint(YoloNAS("n", 2, class_names=["dog", "box"]).eval()), start)
    bench.project.ensure_start(str(start), ["Square"])
    for number in (1, 2):
        job = bench.train()
        assert (job.state, job.reason) == ("succeeded", job.reason)
        current = bench.project.current()
        assert (current.trained, job.version) == (True, current.name), number
        assert Detector(current.weights, "cpu").names == ("Square",)


def test_a_label_starts_from_the_first_of_its_predicted_values_that_the_model_knows() -> None:
    sources = {"Car": ("automobile", "Truck", "bus"), "Cat": ("feline",), "Dog": ("dog",)}
    assert training_job._known_sources(sources, ["dog", "truck", "bus"]) == {"Car": "Truck", "Dog": "dog"}


def test_the_comparison_counts_every_predicted_value_of_a_foreign_base(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def map_labels(control: Any, names: Any, *, own: bool) -> Any:
        asked.append(control.predicted_values)
        return labelstudio.map_labels(control, names, own=own)

    monkeypatch.setattr(training_job, "map_labels", map_labels)
    bench.studio.configs = [config("Square").replace("/></Rect", ' predicted_values="box,crate"/></Rect')]
    assert bench.train().state == "succeeded"
    assert asked == [{"Square": ("box", "crate")}] * 2


def test_a_restarted_job_keeps_its_data_until_another_version_serves(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.begin()
    folder = bench.jobs.folder(job_id)
    bench.go_on(job_id, lambda: (folder / "training" / "resume.pt").exists())
    job = bench.jobs.get(job_id)
    assert job is not None
    training = training_job._Training(job, bench.settings, bench.jobs, bench.studio, lambda: False)  # type: ignore[arg-type]
    bench.studio.tasks.append(task(20))
    assert training._data()[0].tasks["labelled"] == 12
    other = tmp_path / "other.safetensors"
    checkpoint.save(load_checkpoint(bench.project.current()), other)
    newer = bench.project.publish(other, {})  # by hand, while the job was down
    bench.studio.tasks[0]["data"] = task(77)["data"]
    assert training._data()[1] == newer
    assert base64.b64encode((folder / "images" / "1-0").read_bytes()).decode() in task(77)["data"]["image"]
    assert not (folder / "training" / "resume.pt").exists()
    document = json.loads((folder / "data.json").read_text())
    assert (document["base"], document["tasks"]["labelled"]) == (newer.name, 13)


def test_what_is_trained_while_a_person_rolls_back_is_a_candidate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_job, "judge", lambda *_, **__: Verdict(True, False, "as good", 3))
    assert bench.train().version == bench.project.current().name
    job_id = bench.begin()
    published = ProjectRegistry.publish

    def late(project: ProjectRegistry, *arguments: Any, **options: Any) -> Version:
        project.rollback(0)
        return published(project, *arguments, **options)

    monkeypatch.setattr(ProjectRegistry, "publish", late)
    _, job = bench.go_on(job_id)
    assert (job.state, job.version) == ("succeeded", bench.project.version(2).name)
    assert job.reason.startswith(
        f"{job.version} is a candidate and does not serve, as v0 was chosen meanwhile: as good"
    )
    assert bench.project.current().number == 0
    assert [point["epoch"] for point in job.curve] == list(range(1, 1 + job.record["training"]["epochs"]))
    assert job.curve[-1]["ap50"] == job.record["after"]["ap50"]


@pytest.fixture
def watched(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Its trainings have three short epochs, however long they take, and measure after each but the last."""
    monkeypatch.setattr(trainer, "WATCH_SHARE", math.inf)
    monkeypatch.setattr(auto, "MIN_SAMPLES", 1)
    monkeypatch.setattr(auto, "UNLIMITED", 3)
    bench.settings = bench.settings.model_copy(update={"train_minutes": 60})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield bench
    torch.set_num_threads(threads)


def test_a_running_training_shows_its_accuracy_on_held_out_images_and_keeps_it(
    watched: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    real = trainer.train

    def train(data: LabelledImages, val: LabelledImages, **options: Any) -> trainer.TrainResult:
        asked.append({"val": val, **options})
        return real(data, val, **options)

    monkeypatch.setattr(trainer, "train", train)
    job_id = watched.begin()

    def status() -> dict[str, Any]:
        found = watched.jobs.status(job_id)
        assert found is not None
        return found

    code, first = watched.go_on(job_id, lambda: status()["ap50"] is not None)
    assert (code, status()["state"]) == (STOPPED, "running")
    assert first.reason.endswith(f", AP50 {status()['ap50']:.3f}")
    document = json.loads((watched.jobs.folder(job_id) / "data.json").read_text())
    held_out_files = {image["path"] for image in document["held_out"]}
    assert {str(image.path) for image in asked[0]["watch"].images} == held_out_files
    assert not asked[0]["val"].images, "what judges a version must not choose it"
    _, job = watched.go_on(job_id)
    assert job.state == "succeeded", job.reason
    assert (len(first.curve), job.curve[0]) == (1, first.curve[0])
    assert [set(point) for point in job.curve] == [{"epoch", "loss", "ap50"}] * 3
    assert job.curve[-1]["ap50"] == job.record["after"]["ap50"]


def test_the_watched_images_are_some_and_spread_over_the_held_out_ones(bench: Bench, tmp_path: Path) -> None:
    image = LabelledImage(
        tmp_path, np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.bool_), SIDE, SIDE, 0
    )
    data = LabelledImages(("Square",), [replace(image, image_id=number) for number in range(100)])
    some = training_job._some(data, training_job.WATCHED_IMAGES)
    assert [one.image_id for one in some.images] == list(range(0, 100, 4))
    assert training_job._some(some, 50).images == some.images
    assert not len(training_job._some(LabelledImages(("Square",), []), 50))


@pytest.mark.parametrize(("owner", "what"), [(serving, "ways"), (Validation, "look")])
def test_a_cancelled_job_ends_in_the_midst_of_a_quantization_or_a_measurement(
    watched: Bench, monkeypatch: pytest.MonkeyPatch, owner: object, what: str
) -> None:
    left, cancelled = threading.Event(), threading.Event()

    def endless(*_: object) -> None:
        cancelled.set()
        assert left.wait(60), "nobody looked"
        raise SystemExit

    monkeypatch.setattr(owner, what, endless)
    codes: list[int] = []
    job_id = watched.begin()
    with pytest.raises(SystemExit):
        training_job.run(
            job_id,
            watched.settings,
            watched.jobs,
            cancelled.is_set,
            leave=lambda code: (codes.append(code), left.set()),
        )
    assert codes == [STOPPED]


def test_a_trainings_process_gives_way_to_predictions(tmp_path: Path) -> None:
    script = """
import os, sys
from labelstudio_backend import training_job

class LoadingOfTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))

def run(job_id, settings, jobs, should_stop, *, leave):
    import torch

    print(job_id, os.nice(0), torch.get_num_threads())
    return 0

sys.meta_path.insert(0, LoadingOfTorch())
training_job.run = run
sys.exit(training_job.main(["7"]))
"""
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    settings |= {"OMP_NUM_THREADS": "2", "YOLONAS_STATE_DIR": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    nice = min(19, os.nice(0) + training_job.NICENESS)
    assert process.stdout.splitlines() == ["PASSIVE", f"7 {nice} 1"]


def test_a_training_sees_that_its_job_is_cancelled_wherever_that_was_said(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_job, "CANCEL_SECONDS", 0.01)
    job_id, stop = bench.begin(), threading.Event()
    threading.Thread(target=training_job._watch_cancel, args=(bench.jobs, job_id, stop), daemon=True).start()
    assert not stop.wait(0.1)
    bench.jobs.cancel(job_id)
    assert stop.wait(60)


def test_a_resume_file_of_another_model_begins_the_training_anew(bench: Bench) -> None:
    job_id = bench.begin()
    folder = bench.jobs.folder(job_id)
    bench.go_on(job_id, lambda: (folder / "training" / "resume.pt").exists())
    document = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(document | {"train": document["train"][1:]}))
    code, job = bench.go_on(job_id)
    assert (code, job.state) == (0, "succeeded"), job.reason


def test_a_full_disk_is_the_same_sentence_whoever_says_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(bench.jobs, "report", full)
    job = bench.train()
    assert job.reason == "the disk is full (database or disk is full); free some space and train again"


def served_by(bench: Bench, **settings: str) -> tuple[Job, Version, Detector]:
    bench.settings = bench.settings.model_copy(update=settings)
    job = bench.train()
    assert job.state == "succeeded", job.reason
    version = bench.project.current()
    return job, version, serving.load(version, bench.settings)


def test_the_gate_judges_the_quantized_file_and_that_serves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str, str]] = []
    detector = serving.Way.detector

    def spy(way: serving.Way, device: str) -> Detector:
        found = detector(way, device)
        opened.append((way.file.name, found.runtime.name, found.runtime.precision))
        return found

    monkeypatch.setattr(serving.Way, "detector", spy)
    job, version, serves = served_by(bench, runtime="openvino", precision="int8")
    assert opened == [("model.int8.onnx", "openvino", "int8"), ("model.onnx", "openvino", "fp32")]
    asked = {"runtime": "openvino", "asked": "openvino", "precision": "int8"}
    expected = {"file": "model.int8.onnx", "remarks": []} | asked
    assert (version.record["serving"], job.record["serving"]) == (expected, expected)
    assert {path.name for path in version.path.iterdir()} == {"record.json", "model.safetensors", "model.int8.onnx"}
    assert (serves.runtime.name, serves.runtime.precision) == ("openvino", "int8")
    assert serves.names == ("Square",)
    assert serves.checkpoint.conf == pytest.approx(version.record["training"]["threshold"], abs=1e-4)
    assert not (bench.jobs.folder(job.id) / "serving").exists(), "a job does not fill the disk"
    monkeypatch.setattr(training_job, "judge", lambda *_, **__: Verdict(True, False, "", 3))  # three images say little
    second, newer, _ = served_by(bench, precision="fp32")
    assert second.record["base"] == version.name
    assert newer.record["serving"]["file"] == "model.onnx"
    assert second.record["training"]["recipe"]["lr"] < RATES_FROM_RANDOM["n"], "from the float weights"


@pytest.mark.parametrize(
    ("broken", "file", "name"),
    [(("int8",), "model.onnx", "onnxruntime"), (("int8", "fp32"), "model.safetensors", "torch")],
)
def test_what_cannot_be_exported_serves_in_floating_point_and_the_job_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: tuple[str, ...], file: str, name: str
) -> None:
    write = serving._write

    def fail(loaded: Any, path: Path, precision: str, images: Any) -> None:
        if precision in broken:
            raise MissingPackageError("it needs the package nncf: pip install 'yolonas[quantize]'")
        write(loaded, path, precision, images)

    monkeypatch.setattr(serving, "_write", fail)
    job, version, serves = served_by(bench, runtime="onnxruntime", precision="int8")
    remark = "no int8 file for ONNX Runtime could be made: it needs the package nncf: pip install 'yolonas[quantize]'"
    assert remark in job.reason
    assert remark in version.record["serving"]["remarks"]
    assert (version.record["serving"]["file"], version.record["serving"]["precision"]) == (file, "fp32")
    assert serves.runtime.name == name
    assert version.path.joinpath(file).is_file()


def test_int8_that_is_clearly_worse_gives_way_to_float(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*_: Any) -> Verdict:
        return Verdict(False, True, "AP50 0.9 -> 0.1", 25)

    monkeypatch.setattr(serving, "judge", lose)
    job, version, serves = served_by(bench, runtime="openvino", precision="int8")
    assert "INT8 in OpenVINO is worse than float in OpenVINO, which serves: AP50 0.9 -> 0.1" in job.reason
    assert version.record["serving"]["file"] == "model.onnx"
    assert (serves.runtime.name, serves.runtime.precision) == ("openvino", "fp32")
    assert not (version.path / "model.int8.onnx").exists()
