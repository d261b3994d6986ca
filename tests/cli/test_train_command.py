"""`yolonas train` from the outside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.cli import main
from yolonas.data import samples
from yolonas.model import YoloNAS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    samples.generate(folder, 5, image_size=(128, 128))
    return folder / "instances.json"


def run(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CliRunner().invoke(main, ["train", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


QUICK = ("--model", "n", "--imgsz", 64, "--batch", 4, "--device", "cpu")


def test_trains_prints_its_choices_and_resumes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("--data", data, *QUICK, "--epochs", 1, "--out", out)
    assert result.exit_code == 0, result.output
    for words in (
        "YOLO-NAS n with random weights",
        "washer, bolt, nut",
        "training       4 images",
        "validation     1 images",
        "device         cpu",
        "image_size     64 px (as asked)",
        "batch          4 (as asked)",
        "epochs         1 (as asked)",
        "lr             0.004 (from random weights of n, AdamW)",
        "freeze         none (all of it has to learn)",
        "epoch 1/1",
        "AP50",
        f"Wrote {out / 'best.safetensors'}",
    ):
        assert words in result.output
    assert checkpoint.load(out / "best.safetensors").model.class_names == samples.NAMES
    again = run("--data", data, *QUICK, "--epochs", 1, "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    assert "1 epochs in" in again.output
    assert "lr             0.004 (as in the run that goes on)" in again.output
    changed = run("--data", data, *QUICK, "--epochs", 3, "--out", out, "--resume")
    assert changed.exit_code == 1
    assert "was made with another epochs" in changed.output


def test_fine_tunes_from_a_file_within_minutes(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "first"
    assert run("--data", data, "--val", data, *QUICK, "--epochs", 1, "--out", out).exit_code == 0
    tuned = ("--weights", out / "last.safetensors", "--minutes", 0.05)
    result = run("--data", data, *tuned, "--device", "cpu", "--out", tmp_path / "second")
    assert result.exit_code == 0, result.output
    assert "it knows washer, bolt, nut" in result.output
    assert "128 px (for small objects" in result.output
    assert "time_budget_s  3 s (as asked)" in result.output


def test_a_named_recipe_and_the_options_that_change_it(data: Path, tmp_path: Path) -> None:
    out, named = tmp_path / "run", ("--recipe", "coco")
    quick = (*QUICK, "--epochs", 1, "--precision", "float32", "--freeze", "backbone", "--patience", 3)
    result = run("--data", data, *named, *quick, "--out", out)
    assert result.exit_code == 0, result.output
    for words in (
        "lr             0.0002 (as the reference's COCO recipe (it has none for n))",
        "augmentation   mosaic 0, mixup 0.5, flip 0.5, scale 0.5 to 1.5 (as",
        "freeze         backbone (as asked)",
        "patience       3 (as asked)",
    ):
        assert words in result.output
    found = checkpoint.load(out / "best.safetensors")
    assert found.model.preprocessing.resize_to == 60
    assert (found.record["recipe"]["precision"], found.record["recipe"]["clip_norm"]) == ("float32", None)
    other = run("--data", data, "--recipe", "roboflow", *quick, "--out", out, "--resume")
    assert other.exit_code == 1
    assert "was made with another" in other.output
    again = run("--data", data, *named, *quick, "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    assert "Ended early" not in again.output


def test_says_when_it_ended_early(data: Path, tmp_path: Path) -> None:
    still = ("--recipe", "coco", *QUICK, "--epochs", 9, "--lr", 1e-12, "--patience", 2)  # weights that stay as they are
    result = run("--data", data, *still, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "Ended early: the last 2 evaluations brought nothing better." in result.output
    assert "3 epochs in" in result.output


def test_only_the_first_process_talks(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = run("--data", data, "--recipe", "coco", *QUICK, "--epochs", 1, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert result.output == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "nowhere", "--model", "n"), "no data set at nowhere"),
        (("--data", "DATA", "--model", "nothing.pth"), "nothing.pth"),
        (("--data", "DATA", "--model", "n", "--imgsz", "100"), "multiple of 32"),
        (("--data", "DATA", "--model", "n", "--imgsz", "64,96"), "square canvas"),
        (("--data", "DATA", "--model", "n", "--resume"), "--resume needs --out"),
        (("--data", "DATA", "--model", "n", "--resume", "--out", "OUT"), "to resume from"),
        (("--data", "DATA", "--model", "n", "--out", "DATA"), "cannot be written"),
        (("--data", "DATA", "--model", "n", "--device", "cuda:99"), "does not exist"),
    ],
)
def test_mistakes_get_one_sentence(arguments: tuple[str, ...], words: str, data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "OUT": str(tmp_path / "none")}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_learns_from_a_teacher_and_from_images_that_it_labels(tmp_path: Path) -> None:
    samples.generate(tmp_path, 4, image_size=(128, 128))
    for path in sorted(tmp_path.glob("*.jpg"))[:2]:
        shutil.copy(path, tmp_path / f"more-{path.name}")
    teacher, out = tmp_path / "teacher.safetensors", tmp_path / "run"
    checkpoint.save(Checkpoint(YoloNAS("n", 3, class_names=samples.NAMES).eval(), conf=0.005), teacher)  # finds a lot
    taught = ("--data", tmp_path / "instances.json", *QUICK, "--epochs", 1, "--teacher", teacher)
    result = run(*taught, "--unlabelled", tmp_path, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"objects in 2 of 2 images of {tmp_path}" in result.output, "labelled images are not labelled anew"
    record = checkpoint.load(out / "last.safetensors").record
    assert record["recipe"]["distillation"] == 1
    assert record["taught"]
    for option in (("--distillation", 1), ("--unlabelled", tmp_path)):
        refused = run("--data", tmp_path / "instances.json", *QUICK, *option)
        assert refused.exit_code == 2
        assert f"{option[0]} needs --teacher" in refused.output
