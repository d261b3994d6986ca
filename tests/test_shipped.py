"""The checkpoint that comes with the package: small, free, usable without a network, and as good as its record says."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch
from click.testing import CliRunner

from labelstudio_backend import up
from yolonas import Detector, checkpoint
from yolonas.cli import main
from yolonas.data.readers import read_dataset
from yolonas.evaluation import evaluate
from yolonas.weights import SHIPPED, resolve

(NAME,) = SHIPPED


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No weights but the package's own can be found, and none downloaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("yolonas.weights._download", lambda *_: pytest.fail("asked the network"))


def test_is_small_and_free() -> None:
    path = resolve(NAME)
    assert path.stat().st_size < 8e6
    with safetensors.safe_open(path, framework="pt") as file:
        kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert kinds == {torch.float16, torch.int64}
    loaded = checkpoint.load(path)
    assert loaded.license is None
    assert loaded.model.form == "training", "it may be fine-tuned"
    assert loaded.model.class_names == ("RBC", "WBC", "Platelets")
    assert loaded.record["start"] == "random weights of n"


@pytest.mark.parametrize("name", [NAME, f"{NAME}.safetensors"])
def test_is_found_by_name(name: str) -> None:
    assert resolve(name) == resolve(NAME)
    assert not Path("yolonas").exists(), "no licence was shown"


def test_predict_takes_it_by_name(shared: Path) -> None:
    image = shared / "data" / "bccd" / "images" / "BloodImage_00000.jpg"
    result = CliRunner().invoke(main, ["predict", "--source", str(image), "--weights", NAME, "--out", "out"])
    assert result.exit_code == 0, result.output
    assert "RBC" in result.output


def test_up_takes_its_classes_as_labels() -> None:
    assert up.class_names_of(NAME) == ["RBC", "WBC", "Platelets"]


def test_is_as_good_as_its_record_says(shared: Path) -> None:
    recorded = checkpoint.load(resolve(NAME)).record["test_metrics"]
    found = evaluate(Detector(NAME, "cpu"), read_dataset(shared / "data" / "bccd", "test"))
    assert found.images == recorded["images"] == 72
    assert found.ap == pytest.approx(recorded["ap"], abs=0.005)  # another CPU rounds otherwise
    assert found.ap > 0.5
