"""`yolonas info`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.cli import main
from yolonas.model import Preprocessing, YoloNAS


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["info", *arguments])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("weights") / "cells.safetensors"
    model = YoloNAS("n", 2, class_names=["red cell", "white cell"], preprocessing=Preprocessing.square(320))
    checkpoint.save(Checkpoint(model, conf=0.31, license="mine", record={"epochs": 4}), path)
    return path


def test_a_variant() -> None:
    result = run("s")
    assert result.exit_code == 0
    for part in ("12,878,304", "12,167,600", "19,053,888", "31.80 GFLOPs", "15.90 GMACs", "100 conv", "toothbrush"):
        assert part in result.output
    assert max(map(len, result.output.splitlines())) <= 120


def test_a_checkpoint(file: Path) -> None:
    result = run(str(file))
    assert result.exit_code == 0
    for part in (
        "YOLO-NAS-N",
        "red cell, white cell",
        "320x320",
        "conf 0.31",
        "cells.safetensors",
        "mine",
        "epochs: 4",
    ):
        assert part in result.output


def test_json(file: Path) -> None:
    values = json.loads(run(str(file), "--json", "--imgsz", "640").output)
    assert values["class_names"] == ["red cell", "white cell"]
    assert values["preprocessing"]["resize_to"] == 320
    assert values["gmacs"] == pytest.approx(YoloNAS("n", 2).info(640).gmacs)
    assert (values["conf"], values["license"], values["record"]) == (0.31, "mine", {"epochs": 4})
    assert values["file"] == str(file)


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pth"
    empty.touch()
    for argument, part in ((str(empty), "it is empty"), ("nothing.pth", "no name of weights")):
        result = run(argument)
        assert result.exit_code == 1
        assert result.output.startswith("Error: ")
        assert part in result.output
        assert len(result.output.splitlines()) == 1
    assert run("n", "--imgsz", "100").exit_code == 2
