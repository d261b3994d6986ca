"""The training loop: same seed same weights, stopping and going on, and data at the edge of nothing."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rectangles import draw
from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.errors import CheckpointError, DataError, YolonasError
from yolonas.evaluation import evaluate
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.training import trainer, validation
from yolonas.training.loss import DetectionLoss
from yolonas.training.recipe import Recipe
from yolonas.training.report import EpochReport
from yolonas.training.resume import RESUME_FILE
from yolonas.training.schedule import Schedule
from yolonas.training.snapshots import Snapshots
from yolonas.training.trainer import TrainResult, train
from yolonas.training.validation import Validation

NAMES = ("red", "blue")
MEAN = Snapshots.mean
RECIPE = Recipe(image_size=64, batch=4, epochs=4, lr=2e-3, warmup_steps=2, plain_share=0.5, seed=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelledImages, LabelledImages]:
    folder = tmp_path_factory.mktemp("data")
    return draw(folder, 6), draw(folder, 3, seed=9)


@pytest.fixture(scope="module")
def whole(data: tuple[LabelledImages, LabelledImages], tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train(*data, recipe=RECIPE, out_dir=tmp_path_factory.mktemp("whole"), variant="n", device="cpu")


def weights(path: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path).model.state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def rows(result: TrainResult) -> list[dict[str, str]]:
    """results.csv without what the clock decides."""
    with (result.last.parent / "results.csv").open() as file:
        clock = ("seconds", "seconds_left", "images_per_second")
        return [{k: v for k, v in row.items() if k not in clock} for row in csv.DictReader(file)]


def test_writes_what_it_says(whole: TrainResult, data: tuple[LabelledImages, LabelledImages]) -> None:
    best = checkpoint.load(whole.best)
    assert best.model.class_names == NAMES
    assert best.model.variant == "n"
    assert best.model.preprocessing.image_size == (64, 64)
    assert best.model.preprocessing.resize_to == 64
    assert whole.metrics is not None
    assert best.conf == pytest.approx(whole.metrics.threshold)
    assert best.license is None
    assert Recipe.from_dict(best.record["recipe"]) == RECIPE
    assert best.record["train_objects"] == 12
    table = rows(whole)
    assert [row["epoch"] for row in table] == ["1", "2", "3", "4"]
    assert max(float(row["ap"]) for row in table) == pytest.approx(whole.metrics.ap, abs=1e-5)
    page = (whole.best.parent / "report.html").read_text()
    assert "<title>YOLO-NAS n: " in page
    assert f"<dt>AP</dt><dd>{whole.metrics.ap:.3f}</dd>" in page
    assert "Training loss: total from" in page
    assert whole.epochs == 4
    assert not whole.stopped
    assert whole.images_per_second > 0


def test_learns(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=4, min_samples=80, evaluate_every=4, lr=4e-3)
    result = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu")
    assert result.metrics is not None
    assert result.metrics.ap50 > 0.5


def test_same_seed_same_weights(
    whole: TrainResult, data: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    torch.rand(3)  # whatever the process did before must not matter
    again = train(*data, recipe=replace(RECIPE, cache_bytes=0), out_dir=tmp_path / "a", variant="n", device="cpu")
    assert_same_weights(whole.last, again.last)
    assert rows(whole) == rows(again)
    other = train(*data, recipe=replace(RECIPE, seed=2, epochs=1), out_dir=tmp_path / "b", variant="n", device="cpu")
    assert rows(other)[0] != rows(whole)[0]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_resume_gives_the_uninterrupted_run(
    how: str, whole: TrainResult, data: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    reports: list[EpochReport] = []

    def kill(epoch: int, done: int, total: int) -> None:
        if how == "killed" and epoch == 3:
            raise KilledError

    options = {"recipe": RECIPE, "out_dir": tmp_path, "variant": "n", "device": "cpu"}
    try:
        cut = train(
            *data,
            **options,
            on_epoch=reports.append,
            on_step=kill,
            should_stop=lambda: how == "stopped" and len(reports) == 2,
        )
        assert cut.stopped
        assert cut.epochs == 2
    except KilledError:
        assert how == "killed"
    assert [report.epoch for report in reports] == [1, 2]

    resumed = train(*data, **options, resume=True, on_epoch=reports.append)
    assert [report.epoch for report in reports] == [1, 2, 3, 4]
    assert_same_weights(resumed.last, whole.last)
    assert_same_weights(resumed.best, whole.best)
    assert rows(resumed) == rows(whole)
    assert resumed.metrics is not None
    assert whole.metrics is not None
    assert resumed.metrics.ap == whole.metrics.ap
    assert resumed.seconds >= reports[1].seconds

    finished = train(*data, **options, resume=True)
    assert finished.epochs == 4
    assert finished.metrics == resumed.metrics


def test_resume_refuses_what_does_not_fit(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=1)
    options = {"out_dir": tmp_path, "variant": "n", "device": "cpu", "resume": True}
    train(*data, recipe=recipe, **options)  # nothing to resume: begins anew
    with pytest.raises(CheckpointError, match="another lr, seed"):
        train(*data, recipe=replace(recipe, lr=0.5, seed=7), **options)
    with pytest.raises(CheckpointError, match="other data"):
        train(data[0], LabelledImages(NAMES, []), recipe=recipe, **options)
    with pytest.raises(CheckpointError, match="another model"):
        train(*data, recipe=recipe, start=Checkpoint(YoloNAS("n", 2, class_names=NAMES)), **options)
    (tmp_path / RESUME_FILE).write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match=r"resume\.pt is damaged"):
        train(*data, recipe=recipe, **options)


@pytest.mark.parametrize("case", ["one image", "no boxes"])
def test_next_to_nothing_still_trains(case: str, tmp_path: Path) -> None:
    few = draw(tmp_path / "few", 1 if case == "one image" else 3, empty=case == "no boxes")
    recipe = replace(RECIPE, epochs=2, batch=8)
    result = train(few, LabelledImages(NAMES, []), recipe=recipe, out_dir=tmp_path / "out", variant="n", device="cpu")
    assert result.metrics is None
    assert_same_weights(result.best, result.last)
    assert checkpoint.load(result.best).conf == 0.25
    assert all(torch.isfinite(value).all() for value in weights(result.best).values())
    if case == "no boxes":
        again = train(few, few, recipe=recipe, out_dir=tmp_path / "val", variant="n", device="cpu")
        assert again.metrics is not None
        assert again.metrics.ap == 0


def test_nothing_at_all_is_refused(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        train(LabelledImages(NAMES, []), data[1], recipe=RECIPE, out_dir=tmp_path, variant="n")
    strangers = LabelledImages(("cat", "dog"), data[1].images)
    with pytest.raises(DataError, match="no class in common"):
        train(data[0], strangers, recipe=RECIPE, out_dir=tmp_path, variant="n")


def test_known_classes_keep_their_rows_and_the_licence_is_inherited(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    start = Checkpoint(YoloNAS("n", 3, class_names=["green", "Blue", "crimson"]), license="a licence")
    before = start.model.state_dict()
    recipe = replace(RECIPE, epochs=1, lr=1e-12, weight_decay=0.0)
    options = {"recipe": recipe, "out_dir": tmp_path, "device": "cpu", "class_sources": {"red": "crimson"}}
    result = train(*data, start=start, **options)
    after = checkpoint.load(result.last)
    assert after.license == "a licence"
    assert after.model.class_names == NAMES
    for key, rows_kept in (("heads.head1.cls_pred.weight", [2, 1]), ("heads.head3.cls_pred.bias", [2, 1])):
        torch.testing.assert_close(after.model.state_dict()[key], before[key][rows_kept], rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match="fused"):
        train(*data, start=Checkpoint(start.model.fused()), **options)


def test_frozen_parts_stay_as_they_are(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = Checkpoint(YoloNAS("n", 2, class_names=NAMES))
    recipe = replace(RECIPE, epochs=1, freeze="backbone")
    result = train(*data, start=start, recipe=recipe, out_dir=tmp_path, device="cpu")
    before, after = start.model.state_dict(), weights(result.last)
    changed = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"neck", "heads"}


def test_a_loss_that_is_not_finite_stops_with_advice(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DetectionLoss.forward
    monkeypatch.setattr(DetectionLoss, "forward", lambda *args: real(*args)._replace(iou=torch.tensor(float("nan"))))
    with pytest.raises(YolonasError, match=r"epoch 1, step 1.*lower the learning rate, which is 0\.002"):
        train(*data, recipe=RECIPE, out_dir=tmp_path, variant="n", device="cpu")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_without_an_image_that_went_missing_but_not_without_all(workers: int, tmp_path: Path) -> None:
    few = draw(tmp_path, 3)
    few.images[1].path.unlink()
    recipe = replace(RECIPE, workers=workers, epochs=1)

    def run() -> None:
        train(few, LabelledImages(NAMES, []), recipe=recipe, out_dir=tmp_path / "out", variant="n", device="cpu")

    run()
    for image in few.images:
        image.path.unlink(missing_ok=True)
    with pytest.raises(DataError) as caught:
        run()
    assert str(caught.value) == "none of the 3 training images can be read any more"


def test_stopped_at_once_leaves_weights(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    result = train(*data, recipe=RECIPE, out_dir=tmp_path, variant="n", device="cpu", should_stop=lambda: True)
    assert result.stopped
    assert result.epochs == 0
    assert checkpoint.load(result.best).model.class_names == NAMES


def test_time_budget_is_kept(data: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    recipe = replace(RECIPE, epochs=10_000, time_budget_s=4.0)
    begun = time.monotonic()
    result = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu")
    assert time.monotonic() - begun < 30  # of a busy machine with a slow disk; 10,000 epochs take hours
    assert not result.stopped


def test_the_cosine_follows_the_clock(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Schedule, "seconds", lambda self: 0.1 * self.step)
    reports: list[EpochReport] = []
    recipe = replace(RECIPE, epochs=10_000, min_samples=16, time_budget_s=6.0)
    train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu", on_epoch=reports.append)
    assert reports[0].lr > 0.9 * recipe.lr
    assert reports[-1].lr < 0.3 * recipe.lr
    assert reports[-1].epochs == len(reports)


def test_a_slow_report_does_not_leave_the_last_weights_unevaluated(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolonas.training.trainer.write_html", lambda *_, **__: time.sleep(2.5))
    recipe = replace(RECIPE, epochs=10_000, evaluate_every=1000, time_budget_s=2.0)
    result = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu")
    assert result.metrics is not None
    assert result.last.is_file()


def test_patience_ends_a_run_that_gets_no_better(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter([0.2, 0.4, 0.3, 0.4, 0.1])
    real = validation.coco_ap
    monkeypatch.setattr(validation, "coco_ap", lambda *args: replace(real(*args), ap=next(accuracies)))
    recipe = replace(RECIPE, epochs=9, patience=2)
    result = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu")
    assert result.epochs == 4
    assert checkpoint.load(result.best).record["epoch"] == 2
    resumed = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu", resume=True)
    assert resumed.epochs == 4  # it was over


def test_watched_images_are_shown_and_choose_nothing(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "WATCH_SHARE", math.inf)
    accuracies = iter([0.9, 0.5, 0.3])  # by which the first epoch would be the best, and a run with patience over
    real = validation.coco_ap
    monkeypatch.setattr(validation, "coco_ap", lambda *args: replace(real(*args), ap=next(accuracies)))
    nothing, reports = LabelledImages(NAMES, []), list[EpochReport]()
    options = {"recipe": replace(RECIPE, evaluate_every=2, patience=1, average_best=2), "variant": "n", "device": "cpu"}
    blind = train(data[0], nothing, out_dir=tmp_path / "blind", **options)
    seen = train(data[0], nothing, out_dir=tmp_path / "seen", watch=data[1], on_epoch=reports.append, **options)
    assert [report.ap for report in reports] == [0.9, 0.5, 0.3, None]  # the end is no place to look on the way
    assert (seen.metrics, checkpoint.load(seen.best).conf) == (None, Checkpoint.conf)
    assert_same_weights(seen.best, blind.best)
    assert_same_weights(seen.last, blind.last)
    assert "images that were watched only" in (tmp_path / "seen" / "report.html").read_text()
    with pytest.raises(ValueError, match=r"as `val`.*or as `watch`"):
        train(*data, out_dir=tmp_path, watch=data[1], **options)
    strangers = LabelledImages(("cat", "dog"), data[1].images)
    with pytest.raises(DataError, match="no class in common"):
        train(data[0], nothing, out_dir=tmp_path, watch=strangers, **options)


def test_watching_takes_a_tenth_of_the_time_at_most(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[YoloNAS] = []

    def look(self: Validation, model: YoloNAS) -> None:
        looks.append(model)
        now[0] += 0.15

    now = [0.0]
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Validation, "look", look)
    monkeypatch.setattr(Schedule, "seconds", lambda self: 0.5 * self.step)
    monkeypatch.setattr(trainer._Run, "images_per_second", lambda self: 1000.0)  # before the first: 0.03 s expected
    recipe = replace(RECIPE, epochs=8, evaluate_every=8)  # of two steps, a second each
    nothing = LabelledImages(NAMES, [])
    train(data[0], nothing, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu", watch=data[1])
    assert len(looks) == 4


def test_the_mean_of_the_best_weights_is_kept_where_it_is_better(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saved = validation.coco_ap, {}
    for mean_ap in (0.8, 0.3):
        accuracies = iter([0.2, 0.5, 0.1, 0.4, mean_ap])
        monkeypatch.setattr(
            validation, "coco_ap", lambda *args, values=accuracies: replace(real(*args), ap=next(values))
        )
        out = tmp_path / str(mean_ap)
        monkeypatch.setattr(
            Snapshots, "mean", lambda self, out=out: saved.setdefault(out, (self.epochs(), MEAN(self)))[1]
        )
        result = train(*data, recipe=replace(RECIPE, average_best=2), out_dir=out, variant="n", device="cpu")
        epochs, mean = saved[out]
        assert epochs == [2, 4]
        assert not (out / "snapshots").exists()
        assert result.metrics is not None
        record = checkpoint.load(result.best).record
        if mean_ap == 0.8:
            assert result.metrics.ap == 0.8
            assert record["averaged_epochs"] == [2, 4]
            kept = weights(result.best)
            assert all(
                torch.equal(kept[k], v) for k, v in mean.items() if "running" not in k and "num_batches" not in k
            )
        else:
            assert result.metrics.ap == 0.5
            assert "averaged_epochs" not in record


def test_what_is_measured_is_what_the_file_gives(
    whole: TrainResult, data: tuple[LabelledImages, LabelledImages]
) -> None:
    assert whole.metrics is not None
    again = evaluate(Detector(whole.best, device="cpu"), data[1])
    assert again.ap == whole.metrics.ap
    assert again.threshold == whole.metrics.threshold


def test_sixteen_bit_precision_trains_and_is_written_down(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        recipe = replace(RECIPE, epochs=1, precision=precision)
        reports: list[EpochReport] = []
        result = train(*data, recipe=recipe, out_dir=tmp_path, variant="n", device="cpu", on_epoch=reports.append)
        assert checkpoint.load(result.last).record["precision"] == precision
        losses[precision] = reports[0].loss
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)
    with pytest.raises(YolonasError, match="float16 needs a GPU"):
        train(*data, recipe=replace(RECIPE, precision="float16"), out_dir=tmp_path, variant="n", device="cpu")


def test_the_licences_of_start_and_teacher_both_bind(
    data: tuple[LabelledImages, LabelledImages], tmp_path: Path
) -> None:
    model = YoloNAS("n", 2, class_names=NAMES)
    recipe = replace(RECIPE, epochs=1, distillation=1.0)
    options = {"start": Checkpoint(model, license="one"), "out_dir": tmp_path, "device": "cpu"}
    result = train(*data, recipe=recipe, teacher=Checkpoint(model, license="two"), **options)
    assert checkpoint.load(result.last).license == "one; and two"
    assert checkpoint.load(result.last).record["taught"]
    result = train(*data, recipe=replace(recipe, distillation=0.0), teacher=Checkpoint(model, license="two"), **options)
    assert checkpoint.load(result.last).license == "one", "nothing of the teacher is in it"
