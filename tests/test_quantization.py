"""INT8 files: what is in them, what stays in float, and how layers that suffer are found."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import quantized_network
from quantized_network import SPOILT
from yolonas import quantization, quantization_report
from yolonas.checkpoint import Checkpoint, save
from yolonas.cli import main
from yolonas.errors import DataError
from yolonas.exported import read_manifest
from yolonas.fake_quantization import (
    QuantizedConv,
    convolutions,
    fake_quantized,
    input_ranges,
    network_input,
    rounded_weight,
    sensitivity,
    without_fake_quantization,
)
from yolonas.inference.detector import Detector
from yolonas.model import YoloNAS
from yolonas.quantization import PRESETS, Quantizer
from yolonas.quantization_search import Judge, Measured, fewest, select

onnx = pytest.importorskip("onnx")
pytest.importorskip("nncf")
pytest.importorskip("openvino")

LICENSE = "ask the owner"


@dataclass
class Scene:
    checkpoint: Checkpoint
    folder: Path
    quantizer: Quantizer

    def paths(self, part: str) -> list[Path]:
        return [image.path for image in quantized_network.part(self.folder, part).images]


def scene(folder: Path, model: YoloNAS) -> Scene:
    checkpoint = Checkpoint(model, conf=0.4, iou=0.6, license=LICENSE, record={"epoch": 3})
    data = quantized_network.draw(folder, model, {"train": 6, "val": 5})
    paths = [image.path for image in quantized_network.part(data, "train").images]
    return Scene(checkpoint, data, Quantizer(checkpoint, paths))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return scene(tmp_path_factory.mktemp("healthy") / "data", quantized_network.network())


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    model = quantized_network.network()
    quantized_network.spoil(model)
    return scene(tmp_path_factory.mktemp("spoilt") / "data", model)


@pytest.fixture(scope="module")
def full(healthy: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "full.onnx"
    healthy.quantizer.write(path)
    return path


def graph(path: Path) -> tuple[Any, dict[str, np.ndarray], dict[str, Any]]:
    """The model, its constants and the node that makes each tensor."""
    model = onnx.load(path)
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return model, constants, {output: node for node in model.graph.node for output in node.output}


def quantized_inputs(path: Path) -> dict[str, bool]:
    """For each convolution, by its weight's name: whether weight and input come from 8 bits, with symmetric scales."""
    model, constants, makers = graph(path)

    def scales(name: str) -> set[float]:
        """Of the Q/DQ pairs that a tensor comes from, through what only moves values; {nan} where one is missing."""
        node = makers.get(name)
        if node is not None and node.op_type in ("Concat", "MaxPool"):
            return set().union(*(scales(tensor) for tensor in node.input))
        if node is None or node.op_type != "DequantizeLinear":
            return {float("nan")}
        quantize = makers[node.input[0]]
        assert quantize.op_type == "QuantizeLinear"
        assert not constants[quantize.input[2]].any()  # symmetric
        return {float(constants[node.input[1]])}

    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose"):
            continue
        weight = makers.get(node.input[1])
        if weight is None:
            found[node.input[1]] = False
            continue
        assert weight.op_type == "DequantizeLinear"
        assert len(weight.input) == 2  # no zero point: symmetric
        values, scale = (constants[name] for name in weight.input)
        assert values.dtype == np.int8
        axis = {attribute.name: attribute.i for attribute in weight.attribute}["axis"]
        assert axis == (1 if node.op_type == "ConvTranspose" else 0)
        assert scale.shape == (values.shape[axis],)
        of_input = scales(node.input[0])
        found[weight.input[0]] = len(of_input) == 1 and not np.isnan(of_input.pop())
    return found


def test_every_convolution_has_symmetric_int8_weights_per_channel_and_one_scale_for_its_input(full: Path) -> None:
    found = quantized_inputs(full)
    assert len(found) == 80
    assert all(found.values())


def test_layers_are_named_as_the_modules_of_the_network(healthy: Scene) -> None:
    assert sorted(healthy.quantizer.layers) == sorted(convolutions(healthy.checkpoint.model))


def test_heads_float_is_the_skip_list_of_the_reference(healthy: Scene, tmp_path: Path) -> None:
    manifest = healthy.quantizer.write(tmp_path / "heads.onnx", preset="heads-float")
    kept = manifest.record["quantization"]["float_layers"]
    parts = ("cls_convs.0.seq.conv", "cls_pred", "reg_convs.0.seq.conv", "reg_pred")
    assert sorted(kept) == sorted(f"heads.head{level}.{part}" for level in (1, 2, 3) for part in parts)
    quantized = quantized_inputs(tmp_path / "heads.onnx")
    in_float = {name.removeprefix("model.").removesuffix(".weight") for name, yes in quantized.items() if not yes}
    assert in_float == set(kept)


def test_a_file_for_tensorrt_has_no_uint8(healthy: Scene, full: Path, tmp_path: Path) -> None:
    healthy.quantizer.write(tmp_path / "trt.onnx", tensorrt=True)
    kinds = {}
    for path in (full, tmp_path / "trt.onnx"):
        model, constants, _ = graph(path)
        pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        kinds[path.stem] = {constants[node.input[2]].dtype.name for node in pairs}
    assert kinds == {"full": {"uint8", "int8"}, "trt": {"int8"}}
    assert all(quantized_inputs(tmp_path / "trt.onnx").values())
    image = healthy.paths("val")[0]
    expected = Detector(healthy.checkpoint, device="cpu", runtime="torch")(image)
    found = Detector(tmp_path / "trt.onnx", device="cpu", runtime="onnxruntime")(image)
    assert len(found) == pytest.approx(len(expected), rel=0.2)


def test_the_manifest_says_what_was_done_and_carries_the_licence(healthy: Scene, full: Path) -> None:
    manifest = read_manifest(full)
    assert (manifest.precision, manifest.input, manifest.output) == ("int8", "uint8", "raw")
    assert (manifest.class_names, manifest.conf, manifest.iou) == (quantized_network.NAMES, 0.4, 0.6)
    assert manifest.license == LICENSE
    assert manifest.record["epoch"] == 3
    told = manifest.record["quantization"]
    assert (told["preset"], told["calibration_images"], told["float_layers"]) == ("full", 6, [])


def test_the_same_images_give_the_same_file(healthy: Scene, full: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    quantization.quantize(healthy.checkpoint, again, healthy.paths("train"))
    assert again.read_bytes() == full.read_bytes()


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_int8_finds_what_float_finds(healthy: Scene, full: Path, runtime: str) -> None:
    judge = Judge(quantized_network.part(healthy.folder, "val"), runtime)
    path = full.with_name("float.onnx")
    healthy.quantizer.write_float(path)
    base, int8 = judge.measure("float", path), judge.measure("full", full)
    assert base.metrics.ap > 0.95  # the true boxes are the float network's
    assert base.difference is None
    assert int8.difference is not None
    assert 0.6 < int8.metrics.ap < 1  # noise, the hardest of images, and yet
    assert int8.difference.low <= int8.difference.value <= int8.difference.high


def test_the_openvino_ir_is_the_same_network(healthy: Scene, full: Path) -> None:
    path = full.with_suffix(".xml")
    healthy.quantizer.write(path)
    assert read_manifest(path) == read_manifest(full)
    assert not list(path.parent.glob(".*"))
    image = healthy.paths("val")[0]
    one, other = (Detector(p, device="cpu", runtime="openvino")(image, conf=0.05) for p in (full, path))
    assert len(one) == pytest.approx(len(other), abs=3)
    assert np.allclose(one.scores[:50], other.scores[:50], atol=0.05)  # OpenVINO rounds the two a little differently
    assert path.with_suffix(".bin").stat().st_size < 0.3 * sum(
        4 * p.numel() for p in healthy.checkpoint.model.parameters()
    )


def test_a_file_that_cannot_be_made_leaves_what_was_there(healthy: Scene, tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    path.write_bytes(b"older")
    for wrong in ({"preset": "half"}, {"float_layers": ["heads.head9"]}, {"float_layers": ["heads.head1.cls"]}):
        with pytest.raises(ValueError, match=r"half|head9|head1\.cls"):
            healthy.quantizer.write(path, **wrong)  # type: ignore[arg-type]
    assert path.read_bytes() == b"older"
    with pytest.raises(ValueError, match="must end in"):
        healthy.quantizer.write(tmp_path / "int8.pt2")
    with pytest.raises(DataError, match="no image to calibrate"):
        quantization.quantize(healthy.checkpoint, path, [])


def test_rounded_weights_are_whole_steps_of_each_channels_scale() -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for axis in (0, 1):
        rounded = rounded_weight(weight, axis)
        step = weight.abs().amax([d for d in range(4) if d != axis], keepdim=True) / 127
        assert torch.allclose((rounded / step).round() * step, rounded, atol=1e-6)
        assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()
        assert (rounded / step).abs().max() == pytest.approx(127)


def test_a_fake_quantized_network_is_near_the_float_one_and_gives_it_back(healthy: Scene) -> None:
    model, canvases = healthy.checkpoint.model, healthy.quantizer.canvases
    fake = fake_quantized(model, input_ranges(model, canvases), ["backbone.stem.conv.rbr_reparam"])
    assert sum(isinstance(module, QuantizedConv) for module in fake.modules()) == 79
    images = network_input(model, canvases[0])
    expected, imitated = model(images).class_logits[0], fake(images).class_logits[0]
    assert 0 < (imitated - expected).abs().mean() < 0.2 * expected.std()
    restored = without_fake_quantization(fake)
    assert torch.equal(restored(images).class_logits[0], expected)


def test_gradients_reach_the_weights_through_the_rounding(healthy: Scene) -> None:
    model, canvases = healthy.checkpoint.model, healthy.quantizer.canvases
    fake = fake_quantized(model, input_ranges(model, canvases)).requires_grad_(True)
    fake(network_input(model, canvases[0])).class_logits[0].sum().backward()
    gradients = {name: parameter.grad for name, parameter in fake.named_parameters()}
    assert gradients["backbone.stem.conv.rbr_reparam.conv.weight"].abs().sum() > 0


def test_the_layer_that_int8_spoils_is_found_and_left_in_float(spoilt: Scene, tmp_path: Path) -> None:
    found = sensitivity(spoilt.checkpoint.model, spoilt.quantizer.canvases)
    assert list(found) == list(spoilt.quantizer.layers)
    assert max(found, key=found.__getitem__) == SPOILT
    judge = Judge(quantized_network.part(spoilt.folder, "val"))
    spoilt.quantizer.write_float(tmp_path / "float.onnx")
    judge.measure("float", tmp_path / "float.onnx")
    spoilt.quantizer.write(tmp_path / "full.onnx")
    full = judge.measure("full", tmp_path / "full.onnx")
    assert full.difference is not None
    spoilt.quantizer.write(tmp_path / "one.onnx", float_layers=[SPOILT])
    one = judge.measure("one", tmp_path / "one.onnx")
    assert one.difference is not None
    assert one.difference.value > full.difference.value + 0.05  # of AP 0..1
    tries: list[Measured] = []
    limit = -100 * one.difference.low + 1e-6  # points that one layer in float is enough for, and none is not
    assert not full.holds(limit)
    out = tmp_path / "selective.onnx"
    chosen = select(spoilt.quantizer, judge, out, found, max_drop=limit, on_try=tries.append)
    assert chosen.float_layers == (SPOILT,)
    assert len(tries) == 2
    assert read_manifest(out).record["quantization"]["float_layers"] == [SPOILT]
    assert out.read_bytes() == (tmp_path / "one.onnx").read_bytes()


@pytest.mark.parametrize("needed", [0, 1, 2, 3, 5, 11, 13, 37, 79, 80])
def test_the_search_tries_few_counts(needed: int) -> None:
    tried: list[int] = []

    def holds(count: int) -> bool:
        tried.append(count)
        return count >= needed

    found = fewest(80, holds)
    assert needed <= found <= needed + max(needed // 8, 1) * (needed >= 8)
    assert len(tried) <= 12
    assert len(set(tried)) == len(tried)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


def test_the_command_writes_file_table_and_reports(spoilt: Scene, tmp_path: Path) -> None:
    weights, out, report = tmp_path / "n.safetensors", tmp_path / "int8.onnx", tmp_path / "report.html"
    save(spoilt.checkpoint, weights)
    result = run(
        *("--weights", weights, "--data", spoilt.folder, "--out", out, "--report", report, "--device", "cpu"),
        *("--max-drop", 30, "--calibration", 4),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(out)
    assert manifest.precision == "int8"
    assert manifest.record["quantization"]["calibration_images"] == 4
    for line in ("| float |", "| INT8, full |", "OpenVINO, ms", LICENSE):
        assert line in result.output
    assert "trtexec" not in result.output, "TensorRT takes files of --tensorrt alone"
    page = report.read_text()
    assert SPOILT in page
    assert "<svg" in page
    assert "INT8, full" in page
    assert not list(tmp_path.glob(".*"))


def test_reports_of_every_kind_hold_the_same_figures(healthy: Scene, full: Path, tmp_path: Path) -> None:
    judge = Judge(quantized_network.part(healthy.folder, "val"))
    healthy.quantizer.write_float(tmp_path / "float.onnx")
    measured = [judge.measure("float", tmp_path / "float.onnx"), judge.measure("INT8", full)]
    rows = quantization_report.rows(measured, healthy.quantizer.canvases[0], rounds=3)
    assert set(rows[0].latency) == {"openvino", "onnxruntime"}
    assert rows[1].size == full.stat().st_size
    for suffix in ("html", "json", "md"):
        quantization_report.write(tmp_path / f"r.{suffix}", rows, {"a.b": 0.5}, title="T", notes=["N"])
    document = json.loads((tmp_path / "r.json").read_text())
    assert [form["name"] for form in document["forms"]] == ["float", "INT8"]
    assert document["forms"][1]["ap_difference"]["value"] == measured[1].difference.value  # type: ignore[union-attr]
    assert document["sensitivity"] == {"a.b": 0.5}
    for suffix in ("html", "md"):
        text = (tmp_path / f"r.{suffix}").read_text()
        assert f"{100 * measured[1].metrics.ap:.2f}" in text
        assert "a.b" in text
    with pytest.raises(ValueError, match="html"):
        quantization_report.write(tmp_path / "r.txt", rows, {}, title="T", notes=[])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--epochs", "2"], "--qat"),
        (["--tensorrt", "--out", "a.xml"], "--out"),
        (["--out", "a.engine"], "must end in"),
        (["--report", "a.txt"], "--report must end in"),
        (["--max-drop", "0"], "max-drop"),
    ],
)
def test_options_that_do_not_go_together(
    healthy: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(healthy.checkpoint, "n.safetensors")
    result = run("--weights", "n.safetensors", "--data", healthy.folder, *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["n.safetensors"]


def test_data_that_does_not_do(healthy: Scene, full: Path, tmp_path: Path) -> None:
    weights = tmp_path / "n.safetensors"
    save(healthy.checkpoint, weights)
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    document = json.loads((healthy.folder / "train.json").read_text())
    for part in ("train", "val"):
        (unlabelled / f"{part}.json").write_text(json.dumps({**document, "annotations": []}))
    (unlabelled / "images").symlink_to(healthy.folder / "images")
    for arguments, said in (
        (("--weights", full, "--data", healthy.folder), "exported network"),
        (("--weights", weights, "--data", tmp_path / "none"), "no data set"),
        (("--weights", weights, "--data", unlabelled, "--max-drop", 1), "--max-drop needs labelled"),
        (("--weights", weights, "--data", unlabelled, "--qat"), "--qat needs labelled"),
    ):
        result = run(*arguments, "--out", tmp_path / "int8.onnx")
        assert result.exit_code == 1, result.output
        assert said in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "int8.onnx").exists()


def test_a_missing_package_is_named_with_its_install_line(healthy: Scene, tmp_path: Path) -> None:
    save(healthy.checkpoint, tmp_path / "n.safetensors")
    line = (
        "import sys; sys.modules['nncf'] = None; from yolonas.cli import main; "
        f"main(['quantize', '--weights', {str(tmp_path / 'n.safetensors')!r}, '--data', {str(healthy.folder)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "pip install 'yolonas[quantize]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_presets_are_those_of_the_command() -> None:
    command = main.get_command(None, "quantize")  # type: ignore[arg-type]
    assert command is not None
    (option,) = [parameter for parameter in command.params if parameter.name == "preset"]
    assert set(option.type.choices) == set(PRESETS)  # type: ignore[attr-defined]
