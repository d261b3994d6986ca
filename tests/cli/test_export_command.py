"""`yolonas export`, as people call it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from yolonas.checkpoint import DECI_LICENSE, Checkpoint, save
from yolonas.cli import main
from yolonas.exported import Manifest, read_manifest
from yolonas.inference.sources import write_image
from yolonas.model import Preprocessing, YoloNAS


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = YoloNAS("n", 3, class_names=("cat", "dog", "bird"), preprocessing=Preprocessing.square(64)).eval()
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    save(Checkpoint(model, conf=0.5, iou=0.3, license=DECI_LICENSE), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)


def test_pt2_with_every_option(weights: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(2):
        image = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        write_image(pictures / f"{i}.jpg", image)
    out = tmp_path / "new folder" / "out.pt2"
    result = run(
        *("--weights", weights, "--format", "pt2", "--nms", "--output-format", "flat", "--half", "--imgsz", "64,96"),
        *("--batch", 2, "--input", "float", "--conf", 0.005, "--iou", 0.6, "--max-det", 40, "--source", pictures),
        *("--out", out),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert (manifest.precision, manifest.input, manifest.output, manifest.batch) == ("fp16", "float32", "flat", 2)
    assert manifest.image_size == (64, 96)
    assert manifest.nms == {
        "score_threshold": 0.005, "iou_threshold": 0.6, "pre_nms_top_k": 1000, "max_detections": 40,
    }  # fmt: skip
    first, takes, compared, licence = result.output.splitlines()
    assert first.startswith(f"Wrote {out}: 2.")
    assert "MB, fp16, in" in first
    assert takes == "takes images [2, 3, 64, 96] float32; gives detections (flat)"
    assert "boxes agree in 2 images; largest differences" in compared
    assert "(allowed 2)" in compared
    assert licence == f"licence of the weights, which binds this file too: {DECI_LICENSE}"


def test_onnx_is_the_default_and_is_named_after_the_weights(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.onnx").write_text("an older file")
    result = run("--weights", weights)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "mine.onnx")
    assert (manifest.conf, manifest.iou, manifest.output, manifest.image_size) == (0.5, 0.3, "raw", (64, 64))
    assert manifest.license == DECI_LICENSE
    assert "opset 18" in result.output
    assert "takes images [1, 3, 64, 64] uint8; gives the six raw maps" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.onnx"]
    shown = CliRunner().invoke(main, ["info", "mine.onnx", "--json"], catch_exceptions=False)
    assert json.loads(shown.output)["class_names"] == ["cat", "dog", "bird"]


def test_options_reach_the_export(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class StopHereError(Exception):
        pass

    def export(checkpoint: Checkpoint, path: Path, format: str | None, **options: Any) -> Manifest:
        calls.append({"path": path, "format": format, **options})
        raise StopHereError

    monkeypatch.setattr("yolonas.export.export", export)
    with pytest.raises(StopHereError):
        run("--weights", weights, "--format", "openvino", "--int8", "--dynamic", "--data", tmp_path, "--nms")
    assert calls[0]["path"] == Path("mine.xml")
    assert calls[0]["format"] == "openvino"
    assert (calls[0]["int8"], calls[0]["dynamic"], calls[0]["data"]) == (True, True, tmp_path)
    assert (calls[0]["nms"], calls[0]["output_format"], calls[0]["max_det"]) == (True, "batch", 300)
    assert (calls[0]["imgsz"], calls[0]["images"], calls[0]["conf"]) == (None, None, None)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--half", "--int8"], 2, "--half and --int8 exclude each other"),
        (["--output-format", "flat"], 2, "add --nms"),
        (["--int8"], 2, "name a data set with --data"),
        (["--imgsz", "100"], 2, "100 is not a multiple of 32; the nearest is 96"),
        (["--format", "openvino", "--out", "x.onnx"], 2, "x.onnx must end in .xml for the format openvino"),
        (["--out", "x.engine"], 2, "x.engine must end in .onnx, .xml, .pt2"),
        (["--source", "no such folder"], 1, "no such folder"),
        (["--int8", "--data", "no such data"], 1, "no data set at no such data"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: list[str], code: int, words: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("--weights", weights, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_weights_are_not_overwritten(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sg.onnx").write_bytes(b"weights")
    result = run("--weights", "sg.onnx")
    assert result.exit_code == 1
    assert "would be written over the weights" in result.output
