"""What serves a version: the runtime of the machine, the choice between INT8 and float, and old versions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from labelstudio_backend import serving
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.serving import Way, choose
from labelstudio_backend.settings import Settings
from yolonas import checkpoint
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.export import export_raw_onnx
from yolonas.inference.detections import Detections
from yolonas.model import Preprocessing, YoloNAS

INT8, FLOAT, WEIGHTS = (
    Way(Path("model.int8.onnx"), "openvino", "int8"),
    Way(Path("model.onnx"), "openvino", "fp32"),
    Way(Path("model.safetensors"), "torch", "fp32"),
)


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ({"openvino", "onnxruntime", "onnx", "onnxscript"}, "openvino"),
        ({"onnxruntime", "onnx", "onnxscript"}, "onnxruntime"),
        ({"openvino", "onnxruntime", "onnx"}, "torch"),  # nothing can be exported
        (set(), "torch"),
    ],
)
def test_auto_is_the_quickest_that_is_installed(
    installed: set[str], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object() if package in installed else None)
    assert serving.runtime_of(Settings(state_dir=tmp_path, device="cpu")) == name
    assert serving.runtime_of(Settings(state_dir=tmp_path, device="cpu", runtime="torch")) == "torch"


def test_int8_without_a_runtime_for_it_says_what_to_install(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path, device="cpu", runtime="torch", precision="int8")
    ways, remarks = serving.ways(tmp_path / "model.safetensors", tmp_path, [], settings)
    assert ways == [Way(tmp_path / "model.safetensors", "torch", "fp32")]
    assert remarks == ["INT8 needs OpenVINO or ONNX Runtime: pip install 'yolonas[quantize]', or YOLONAS_RUNTIME"]


def held_out(count: int) -> LabelledImages:
    images = []
    for number in range(count):
        boxes = np.array([[10.0 * i, 10.0, 10.0 * i + 8, 20.0] for i in range(4)], dtype=np.float32)
        crowd = np.zeros(4, dtype=bool)
        images.append(LabelledImage(Path(f"{number}.jpg"), boxes, np.zeros(4, np.int64), crowd, 64, 64, number + 1))
    return LabelledImages(("bolt",), images)


def found(data: LabelledImages, share: float) -> list[Detections]:
    keep = round(4 * share)
    return [
        Detections(image.boxes[:keep], np.ones(keep), image.labels[:keep], data.names, (64, 64))
        for image in data.images
    ]


@pytest.mark.parametrize(("share", "taken"), [(1.0, INT8), (0.5, FLOAT)])
def test_int8_serves_unless_the_gate_finds_it_worse(share: float, taken: Way) -> None:
    data = held_out(24)
    results = {INT8: found(data, share), FLOAT: found(data, 1.0)}
    remarks: list[str] = []
    way, detections = choose([INT8, FLOAT, WEIGHTS], remarks, data, results.__getitem__)
    assert way == taken
    assert detections is results[taken]
    assert bool(remarks) == (taken is FLOAT)


def test_a_way_that_does_not_work_is_passed_over_with_a_line() -> None:
    data = held_out(3)
    results = {WEIGHTS: found(data, 1.0)}
    remarks: list[str] = []

    def detect(way: Way) -> list[Detections]:
        if way not in results:
            raise RuntimeError("no such instruction")
        return results[way]

    assert choose([INT8, FLOAT, WEIGHTS], remarks, data, detect)[0] == WEIGHTS
    assert remarks == [
        "INT8 in OpenVINO does not work: no such instruction",
        "float in OpenVINO does not work: no such instruction",
    ]
    results.clear()
    with pytest.raises(RuntimeError, match="no such instruction"):
        choose([INT8, FLOAT, WEIGHTS], [], data, detect)


def test_int8_is_judged_by_the_weights_where_the_float_file_does_not_work() -> None:
    data = held_out(24)
    results = {INT8: found(data, 0.5), WEIGHTS: found(data, 1.0)}
    remarks: list[str] = []
    assert choose([INT8, FLOAT, WEIGHTS], remarks, data, results.__getitem__)[0] == WEIGHTS
    assert remarks[-1].startswith("INT8 in OpenVINO is worse than float in PyTorch, which serves: AP50 1.000 -> 0.5")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = YoloNAS("n", 1, class_names=("bolt",), preprocessing=Preprocessing.square(64)).eval()
    path = tmp_path / "model.safetensors"
    checkpoint.save(checkpoint.Checkpoint(model), path)
    return path


@pytest.fixture
def project(tmp_path: Path) -> ProjectRegistry:
    return Registry(tmp_path / "projects").register("http://ls", "5.1795289898")


def test_a_version_without_an_exported_file_serves_in_the_chosen_runtime(
    weights: Path, project: ProjectRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    old = project.publish(weights, {"labels": ["bolt"]})
    for runtime in ("torch", "onnxruntime"):
        settings = Settings(state_dir=tmp_path, device="cpu", runtime=runtime)
        assert serving.load(old, settings).runtime.name == runtime


def test_a_version_s_own_file_serves_and_its_weights_where_that_cannot(
    weights: Path, project: ProjectRegistry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exported = tmp_path / "model.onnx"
    export_raw_onnx(checkpoint.load(weights), exported)
    record = {"serving": {"file": "model.onnx", "runtime": "onnxruntime", "precision": "fp32", "remarks": []}}
    version = project.publish(weights, record, [exported])
    auto = Settings(state_dir=tmp_path, device="cpu")
    assert serving.load(version, auto).runtime.name == "onnxruntime", "what the gate has judged"
    assert serving.load(version, auto.model_copy(update={"runtime": "torch"})).runtime.name == "torch"
    (version.path / "model.onnx").write_bytes(b"")
    assert serving.load(version, auto).runtime.name == "torch"
    assert f"{version.name} is served from its float weights by PyTorch: " in caplog.text
