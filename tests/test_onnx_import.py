"""ONNX files as super-gradients exports them, and our own, back into the network. Built here: no published file is."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import Tensor, nn

from yolonas.checkpoint import DECI_LICENSE, Checkpoint, load
from yolonas.cli import main
from yolonas.errors import CheckpointError, MissingPackageError
from yolonas.export import export, export_raw_onnx
from yolonas.exported import find_manifest, read_manifest
from yolonas.inference.detector import Detector
from yolonas.model import Preprocessing, YoloNAS
from yolonas.onnx_import import structure
from yolonas.onnx_nms import append_nms
from yolonas.tracing import OPSET, quiet

SIZE = 64


def random_fused(variant: str, num_classes: int = 5) -> YoloNAS:
    """A fused network all of whose numbers are random, alphas included; the first alpha is exactly 1."""
    torch.manual_seed(3)
    model = YoloNAS(variant, num_classes).fused()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.uniform_(0.3, 0.8)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.1)
        next(p for name, p in model.named_parameters() if name.endswith("alpha")).fill_(1.0)
    return model


class SuperGradientsForm(nn.Module):
    """What super-gradients' exporter traces: `model` with 1/255 before and the DFL as a 1x1 convolution behind."""

    def __init__(self, model: YoloNAS, normalizes: bool = False) -> None:
        super().__init__()
        self.model = model
        self.normalizes = normalizes
        self.register_buffer("project", torch.arange(17.0).reshape(1, 17, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.float() / 255
        if self.normalizes:
            x = (x - torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)) / 0.25
        raw = self.model(x)
        boxes, scores = [], []
        for stride, cls, reg in zip(self.model.strides, raw.class_logits, raw.box_logits, strict=True):
            h, w = reg.shape[2:]
            sides = reg.reshape(-1, 4, 17, h * w).permute(0, 2, 3, 1).softmax(1)
            lt, rb = nn.functional.conv2d(sides, self.project).squeeze(1).chunk(2, -1)
            y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
            points = torch.stack([x, y], -1).reshape(1, -1, 2)
            boxes.append(torch.cat([points - lt, points + rb], -1) * stride)
            scores.append(cls.flatten(2).permute(0, 2, 1).sigmoid())
        return torch.cat(boxes, 1), torch.cat(scores, 1)


def as_super_gradients(model: YoloNAS, path: Path, normalizes: bool = False) -> Path:
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        form = SuperGradientsForm(model, normalizes).eval()
        torch.onnx.export(form, (images,), str(path), opset_version=OPSET, dynamo=False)
    return path


@pytest.fixture(scope="module")
def model() -> YoloNAS:
    return random_fused("n")


@pytest.fixture(scope="module")
def sg(model: YoloNAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_super_gradients(model, tmp_path_factory.mktemp("sg") / "sg.onnx")


@pytest.fixture(scope="module")
def ours(model: YoloNAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "ours.onnx"
    with_names = Checkpoint(model, conf=0.3, iou=0.6, license="none but mine", record={"ap": 0.5})
    model.preprocessing = Preprocessing(image_size=(96, 64), resize_to=90, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    model.class_names = ("ant", "bee", "cow", "dog", "eel")
    export_raw_onnx(with_names, path)
    model.preprocessing = Preprocessing()
    model.class_names = tuple(f"class_{i}" for i in range(5))
    return path


def assert_same(loaded: YoloNAS, model: YoloNAS, tolerance: float = 0) -> None:
    assert loaded.variant == model.variant
    state, expected = loaded.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=tolerance, atol=tolerance, msg=key)


@pytest.mark.parametrize("variant", ["s", "m", "l"])
def test_a_file_of_each_published_size_gives_its_weights_and_maps(variant: str, tmp_path: Path) -> None:
    model = random_fused(variant)
    loaded = load(as_super_gradients(model, tmp_path / "sg.onnx"))
    assert_same(loaded.model, model)
    assert loaded.license == DECI_LICENSE
    images = torch.rand(1, 3, SIZE, SIZE)
    for got, expected in zip(sum(loaded.model(images), ()), sum(model(images), ()), strict=True):
        assert torch.equal(got, expected)


def test_the_loaded_network_computes_what_onnxruntime_computes(sg: Path) -> None:
    import onnxruntime

    images = np.random.default_rng(0).integers(0, 256, (1, 3, SIZE, SIZE), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(sg), providers=["CPUExecutionProvider"])
    expected = session.run(None, {session.get_inputs()[0].name: images})
    with torch.no_grad():
        got = SuperGradientsForm(load(sg).model)(torch.from_numpy(images))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def shuffled(model: onnx.ModelProto) -> None:
    """Another order in which the nodes can run."""
    random.seed(1)
    nodes, known = list(model.graph.node), {t.name for t in (*model.graph.initializer, *model.graph.input)} | {""}
    ordered = []
    while nodes:
        ready = [node for node in nodes if known.issuperset(node.input)]
        node = random.choice(ready)
        nodes.remove(node)
        known.update(node.output)
        ordered.append(node)
    del model.graph.node[:]
    model.graph.node.extend(ordered)


def nameless(model: onnx.ModelProto) -> None:
    """Names that mean nothing, as `onnx::Conv_1234`."""
    names: dict[str, str] = {"": ""}
    kept = {v.name for v in (*model.graph.input, *model.graph.output)}

    def rename(name: str) -> str:
        return name if name in kept else names.setdefault(name, f"onnx::x_{len(names)}")

    for node in model.graph.node:
        node.name = ""
        node.input[:] = map(rename, node.input)
        node.output[:] = map(rename, node.output)
    for tensor in model.graph.initializer:
        tensor.name = rename(tensor.name)
    del model.graph.value_info[:]


def deduplicated(model: onnx.ModelProto) -> None:
    """One initializer for all that are equal."""
    first: dict[tuple[Any, ...], str] = {}
    replaced = {}
    for tensor in list(model.graph.initializer):
        key = (tuple(tensor.dims), tensor.data_type, numpy_helper.to_array(tensor).tobytes())
        replaced[tensor.name] = first.setdefault(key, tensor.name)
        if replaced[tensor.name] != tensor.name:
            model.graph.initializer.remove(tensor)
    for node in model.graph.node:
        node.input[:] = [replaced.get(name, name) for name in node.input]


def without_ones(model: onnx.ModelProto) -> None:
    """Multiplications by exactly 1 removed, as simplifiers do."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    removed = 0
    for node in list(model.graph.node):
        if node.op_type != "Mul":
            continue
        for factor, other in (tuple(node.input), tuple(node.input)[::-1]):
            if factor in constants and constants[factor].size == 1 and float(constants[factor].reshape(())) == 1:
                for reader in model.graph.node:
                    reader.input[:] = [other if name == node.output[0] else name for name in reader.input]
                model.graph.node.remove(node)
                removed += "bottlenecks" in node.name
                break
    assert removed == 1  # the alpha that is


def constants_as_nodes(model: onnx.ModelProto) -> None:
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    del model.graph.initializer[:]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *rest])


@pytest.mark.parametrize("change", [shuffled, nameless, deduplicated, without_ones, constants_as_nodes])
def test_what_exporters_and_simplifiers_do_to_a_graph_changes_nothing(
    change: Callable[[onnx.ModelProto], None], model: YoloNAS, sg: Path, tmp_path: Path
) -> None:
    proto = onnx.load(sg)
    change(proto)
    onnx.save(proto, tmp_path / "changed.onnx")
    assert_same(load(tmp_path / "changed.onnx").model, model)


def test_all_of_it_at_once(model: YoloNAS, sg: Path, tmp_path: Path) -> None:
    proto = onnx.load(sg)
    for change in (without_ones, nameless, deduplicated, shuffled):
        change(proto)
    onnx.save(proto, tmp_path / "changed.onnx")
    assert_same(load(tmp_path / "changed.onnx").model, model)


def test_equal_weights_that_the_exporter_merged_are_found(tmp_path: Path) -> None:
    model = random_fused("n")
    with torch.no_grad():
        model.heads.head1.reg_convs[0].seq.conv.bias.copy_(model.heads.head1.cls_convs[0].seq.conv.bias)
        model.heads.head1.reg_convs[0].seq.conv.weight.copy_(model.heads.head1.cls_convs[0].seq.conv.weight)
    path = as_super_gradients(model, tmp_path / "sg.onnx")
    assert_same(load(path).model, model)


def test_an_nms_behind_the_network_is_ignored(model: YoloNAS, ours: Path, tmp_path: Path) -> None:
    nms = {"score_threshold": 0.1, "iou_threshold": 0.7, "pre_nms_top_k": 1000, "max_detections": 100}
    onnx.save(append_nms(onnx.load(ours), "flat", 5, nms), tmp_path / "nms.onnx")
    assert_same(load(tmp_path / "nms.onnx").model, model)


def test_a_network_with_68_classes_is_read_in_order(tmp_path: Path) -> None:
    """Its class predictors have the shape of the box predictors: structure alone does not tell them apart."""
    model = random_fused("n", 68)
    assert_same(load(as_super_gradients(model, tmp_path / "sg.onnx")).model, model)


def test_our_file_comes_back_with_all_that_it_says(model: YoloNAS, ours: Path) -> None:
    loaded = load(ours)
    assert_same(loaded.model, model)
    assert loaded.model.class_names == ("ant", "bee", "cow", "dog", "eel")
    assert loaded.model.preprocessing.image_size == (96, 64)
    assert loaded.model.preprocessing.mean == (0.4, 0.5, 0.6)
    assert (loaded.conf, loaded.iou, loaded.license, loaded.record) == (0.3, 0.6, "none but mine", {"ap": 0.5})


def test_only_our_file_has_a_manifest(sg: Path, ours: Path, tmp_path: Path) -> None:
    manifest = find_manifest(ours)
    assert manifest is not None
    assert manifest == read_manifest(ours)
    assert manifest.class_names == ("ant", "bee", "cow", "dog", "eel")
    assert find_manifest(sg) is None
    with pytest.raises(CheckpointError, match=r"sg\.onnx was not exported by yolonas"):
        read_manifest(sg)
    (tmp_path / "cut.onnx").write_bytes(ours.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cut\.onnx is damaged"):
        find_manifest(tmp_path / "cut.onnx")


def test_our_float16_file_comes_back_rounded(model: YoloNAS, tmp_path: Path) -> None:
    proto = onnx.load(_half(model, tmp_path))
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    loaded = load(tmp_path / "half.onnx").model
    expected = model.fused().half().float()
    assert_same(loaded, expected)


def _half(model: YoloNAS, folder: Path) -> Path:
    return export(Checkpoint(model), folder / "half.onnx", half=True, imgsz=SIZE).path


def test_a_detector_and_the_command_line_take_such_a_file(model: YoloNAS, sg: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    got = Detector(load(sg), device="cpu")(image, conf=0.3, imgsz=SIZE)
    expected = Detector(model, device="cpu")(image, conf=0.3, imgsz=SIZE)
    assert len(expected) > 0
    np.testing.assert_array_equal(got.boxes, expected.boxes)
    result = CliRunner().invoke(main, ["info", str(sg)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "YOLO-NAS-N" in result.output
    assert "class_4" in result.output


def test_pixels_that_the_file_normalizes_are_not_guessed(model: YoloNAS, tmp_path: Path) -> None:
    path = as_super_gradients(model, tmp_path / "normalized.onnx", normalizes=True)
    with pytest.raises(CheckpointError, match=r"normalized.onnx changes the pixels .* preprocessing=Preprocessing"):
        load(path)
    given = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.25, 0.25, 0.25))
    assert load(path, preprocessing=given).model.preprocessing == given


def quantized(proto: onnx.ModelProto) -> None:
    conv = next(node for node in proto.graph.node if node.op_type == "Conv")
    proto.graph.node.insert(0, onnx.helper.make_node("DequantizeLinear", [conv.input[1], "scale"], ["w8"]))


def outside(proto: onnx.ModelProto) -> None:
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[0] > 1)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../../etc/passwd")


def rewired(proto: onnx.ModelProto) -> None:
    convs = {node.name: node for node in proto.graph.node if node.op_type == "Conv"}
    one, other = (convs[f"/model/neck/neck3/blocks/{name}/conv/Conv"] for name in ("conv1", "conv2"))
    bottleneck = convs["/model/neck/neck3/blocks/bottlenecks.0/cv1/conv/Conv"]
    assert one.input[0] == other.input[0]
    after = next(node for node in proto.graph.node if node.op_type == "Relu" and node.input[0] == other.output[0])
    before = bottleneck.input[0]
    for node in proto.graph.node:
        if before in node.input and node.op_type == "Mul":
            node.input[:] = [after.output[0] if name == before else name for name in node.input]


def smaller(proto: onnx.ModelProto) -> None:
    del proto.graph.node[len(proto.graph.node) // 2 :]


def no_convolution(proto: onnx.ModelProto) -> None:
    del proto.graph.node[:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized, "is quantized.*load the file it was quantized from"),
        (outside, "keeps its weights in another file"),
        (rewired, "connects them in another way"),
        (smaller, "not those of a fused YOLO-NAS"),
        (no_convolution, "holds no convolution"),
    ],
)
def test_another_network_is_refused_by_one_sentence(
    change: Callable[[onnx.ModelProto], None], words: str, sg: Path, tmp_path: Path
) -> None:
    proto = onnx.load(sg)
    change(proto)
    path = tmp_path / "other.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(keep: float, sg: Path, tmp_path: Path) -> None:
    data = sg.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(keep if isinstance(keep, int) else keep * len(data))])
    with pytest.raises(CheckpointError, match=r"cut\.onnx is damaged or not") as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_bytes_load_or_are_refused(seed: int, sg: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    data = np.frombuffer(sg.read_bytes(), dtype=np.uint8).copy()
    # half of them in the graph's description, the rest anywhere
    places = rng.integers(0, [3000] * 4 + [len(data)] * 4)
    data[places] = rng.integers(0, 256, 8)
    path = tmp_path / "damaged.onnx"
    path.write_bytes(data.tobytes())
    try:
        load(path)
    except CheckpointError as error:
        assert str(error).startswith(str(path))  # noqa: PT017


def test_garbage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    for data in (bytes(range(256)) * 100, b"\x08\x0a" * 1000, b"<html>"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"is damaged or not|holds no convolution"):
            load(path)


def test_a_missing_package_is_named(sg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match=r"reading an ONNX file needs the package onnx.*yolonas\[onnx\]"):
        load(sg)


@pytest.mark.parametrize("variant", ["s", "m", "l"])
def test_the_order_is_that_of_the_reference(variant: str, shared: Path) -> None:
    import json

    with torch.device("meta"):
        model = YoloNAS(variant).fused()
    expected = json.loads((shared / "vectors" / f"yolo_nas_{variant}_exec_order.json").read_text())["conv_order"]
    assert [conv.name for conv in structure(model)] == expected
