"""Exported files: what they take and give, that they find what the model finds, and that no other file is kept."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from yolonas import ops, parity, tracing
from yolonas.checkpoint import Checkpoint
from yolonas.errors import DataError, ExportError, MissingPackageError
from yolonas.export import Exported, export, export_raw_onnx
from yolonas.exported import INPUT_NAME, METADATA_KEY, RAW_OUTPUT_NAMES, Manifest, read_manifest
from yolonas.extras import openvino_core
from yolonas.inference.letterbox import letterbox
from yolonas.inference.runtimes import decode
from yolonas.inference.sources import write_image
from yolonas.model import Preprocessing, YoloNAS
from yolonas.tracing import RawNetwork

STRIDES = (8, 16, 32)
SIDE = 64


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """Three classes and some dozens of boxes in any picture, with a normalization that tells the channels apart."""
    torch.manual_seed(0)
    preprocessing = Preprocessing(
        image_size=(SIDE, SIDE), resize_to=60, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), channels="bgr"
    )
    model = YoloNAS("n", 3, class_names=("cat", "dog", "bird"), preprocessing=preprocessing).eval()
    for parameter in model.parameters():  # untrained scores all lie at 0.01; these spread over 0..1
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, a=0.75)
    for level in model.heads.levels:
        torch.nn.init.zeros_(level.cls_pred.bias)
        level.reg_pred.bias.data = -torch.arange(17.0).repeat(4)  # small boxes
    return Checkpoint(model, conf=0.5, iou=0.6, license="mine: do not sell", record={"ap": 0.5})


@pytest.fixture(scope="module")
def canvases(checkpoint: Checkpoint) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(1)
    pictures = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    preprocessing = checkpoint.model.preprocessing
    boards = [letterbox(picture, preprocessing)[0].transpose(2, 0, 1) for picture in pictures]
    return np.ascontiguousarray(np.stack(boards))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def raw_onnx(checkpoint: Checkpoint, folder: Path) -> Exported:
    return export(checkpoint, folder / "raw.onnx")


@pytest.fixture(scope="module")
def dynamic_onnx(checkpoint: Checkpoint, folder: Path) -> Exported:
    return export(checkpoint, folder / "dynamic.onnx", "onnx", nms=True, dynamic=True, conf=0.6, iou=0.5, max_det=20)


@pytest.fixture(scope="module")
def flat_openvino(checkpoint: Checkpoint, folder: Path) -> Exported:
    return export(
        checkpoint, folder / "flat.xml", nms=True, output_format="flat", half=True, input="float", imgsz=(64, 96),
        batch=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dynamic_pt2(checkpoint: Checkpoint, folder: Path) -> Exported:
    return export(checkpoint, folder / "dynamic.pt2", nms=True, output_format="flat", dynamic=True)


def expected_maps(checkpoint: Checkpoint, canvases: Any) -> list[torch.Tensor]:
    """By the training form and by torch's own arithmetic of the preprocessing."""
    p = checkpoint.model.preprocessing
    images = torch.from_numpy(canvases).float() / 255
    images = (images - torch.tensor(p.mean).reshape(3, 1, 1)) / torch.tensor(p.std).reshape(3, 1, 1)
    with torch.no_grad():
        raw = checkpoint.model(images)
    return [*raw.class_logits, *raw.box_logits]


def expected_detections(checkpoint: Checkpoint, canvases: Any, **nms: Any) -> ops.Decoded:
    maps = expected_maps(checkpoint, canvases)
    options = {"score_threshold": checkpoint.conf, "iou_threshold": checkpoint.iou} | nms
    return ops.decode_nms(maps[:3], maps[3:], STRIDES, **options)


def test_the_manifest_says_what_the_file_is(checkpoint: Checkpoint, raw_onnx: Exported) -> None:
    manifest = read_manifest(raw_onnx.path)
    assert manifest == raw_onnx.manifest
    assert manifest == Manifest(
        "n", ("cat", "dog", "bird"), checkpoint.model.preprocessing, 0.5, 0.6, "mine: do not sell", {"ap": 0.5},
        precision="fp32", input="uint8", output="raw", nms=None, image_size=(SIDE, SIDE), batch=1,
    )  # fmt: skip
    assert raw_onnx.opset == next(o.version for o in onnx.load(raw_onnx.path).opset_import if o.domain == "")
    assert raw_onnx.size == raw_onnx.path.stat().st_size
    assert raw_onnx.parity.passed
    assert raw_onnx.parity.compared > 50


def test_a_raw_file_gives_the_maps(checkpoint: Checkpoint, raw_onnx: Exported, canvases: Any) -> None:
    session = onnxruntime.InferenceSession(str(raw_onnx.path), providers=["CPUExecutionProvider"])
    (image,) = session.get_inputs()
    assert (image.name, image.type, image.shape) == (INPUT_NAME, "tensor(uint8)", [1, 3, SIDE, SIDE])
    maps = session.run(list(RAW_OUTPUT_NAMES), {INPUT_NAME: canvases[:1]})
    for got, expected in zip(maps, expected_maps(checkpoint, canvases[:1]), strict=True):
        np.testing.assert_allclose(got, expected.numpy(), atol=2e-3)


def test_a_file_tells_nothing_of_the_machine_that_wrote_it(raw_onnx: Exported) -> None:
    assert b".py" not in raw_onnx.path.read_bytes()


def test_a_dynamic_file_takes_any_size_and_gives_padded_detections(
    checkpoint: Checkpoint, dynamic_onnx: Exported, canvases: Any
) -> None:
    manifest = read_manifest(dynamic_onnx.path)
    assert (manifest.output, manifest.image_size, manifest.batch) == ("batch", None, None)
    assert (manifest.conf, manifest.iou) == (0.6, 0.5)
    nms = {"score_threshold": 0.6, "iou_threshold": 0.5, "pre_nms_top_k": 1000, "max_detections": 20}
    assert manifest.nms == nms
    session = onnxruntime.InferenceSession(str(dynamic_onnx.path), providers=["CPUExecutionProvider"])
    wide = np.ascontiguousarray(np.concatenate([canvases, canvases[:, :, :32]], axis=2))  # [3, 3, 96, 64]
    for images in (canvases, canvases[:1], wide):
        counts, boxes, scores, labels = session.run(None, {INPUT_NAME: images})
        expected = expected_detections(checkpoint, images, **nms)
        assert counts[:, 0].tolist() == expected.counts.tolist()
        assert counts.sum() > 0
        for i, n in enumerate(counts[:, 0]):
            np.testing.assert_allclose(boxes[i, :n], expected.boxes[i, :n].numpy(), atol=0.05)
            np.testing.assert_allclose(scores[i, :n], expected.scores[i, :n].numpy(), atol=1e-4)
            assert labels[i, :n].tolist() == expected.labels[i, :n].tolist()


def test_openvino_reads_its_file_with_float_images(
    checkpoint: Checkpoint, flat_openvino: Exported, canvases: Any
) -> None:

    manifest = read_manifest(flat_openvino.path)
    assert manifest == flat_openvino.manifest
    assert (manifest.precision, manifest.input, manifest.output) == ("fp16", "float32", "flat")
    assert (manifest.image_size, manifest.batch) == ((64, 96), 2)
    # the margin grows with the canvas, as in a Detector
    assert (manifest.preprocessing.image_size, manifest.preprocessing.resize_to) == ((64, 96), 90)
    weights = flat_openvino.path.with_suffix(".bin")
    assert flat_openvino.size == flat_openvino.path.stat().st_size + weights.stat().st_size
    assert weights.stat().st_size < 2.2e6  # 1.0 M parameters of 2 bytes
    core = openvino_core()
    compiled = core.compile_model(core.read_model(flat_openvino.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = np.concatenate([canvases[:2], canvases[1:, :, :, :32]], axis=3)
    flat = compiled(images.astype(np.float32) / 255)["flat_predictions"]
    expected = expected_detections(checkpoint, images)
    for i in range(2):
        rows, n = flat[flat[:, 0] == i], int(expected.counts[i])
        assert abs(len(rows) - n) <= 2  # at the threshold
        assert n > 5
        assert abs(rows[0, 5] - expected.scores[i, 0]) < 0.01


def test_torch_export_loads_its_file_and_runs_it(checkpoint: Checkpoint, dynamic_pt2: Exported, canvases: Any) -> None:
    assert read_manifest(dynamic_pt2.path) == dynamic_pt2.manifest
    extra = {METADATA_KEY: ""}
    program = torch.export.load(str(dynamic_pt2.path), extra_files=extra)
    assert Manifest.from_json(extra[METADATA_KEY]) == dynamic_pt2.manifest
    for images in (canvases, canvases[:1]):
        (flat,) = program.module()(torch.from_numpy(images))
        expected = expected_detections(checkpoint, images)
        assert len(flat) == expected.counts.sum() > 5
        for i, n in enumerate(expected.counts.tolist()):
            rows = flat[flat[:, 0] == i]
            torch.testing.assert_close(rows[:, 1:5], expected.boxes[i, :n], rtol=0, atol=0.05)
            torch.testing.assert_close(rows[:, 5], expected.scores[i, :n], rtol=0, atol=1e-4)
            assert rows[:, 6].tolist() == expected.labels[i, :n].tolist()


def test_a_raw_program_needs_no_line_of_ours(checkpoint: Checkpoint, folder: Path) -> None:
    import subprocess

    exported = export(checkpoint, folder / "raw.pt2", half=True)
    assert exported.manifest.precision == "fp16"
    assert exported.size < 2.9e6
    code = (
        "import sys, torch; network = torch.export.load(sys.argv[1]).module();"
        "maps = network(torch.zeros(1, 3, 64, 64, dtype=torch.uint8));"
        "print([list(m.shape) for m in maps], maps[0].dtype, 'yolonas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, exported.path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        "[[1, 3, 8, 8], [1, 3, 4, 4], [1, 3, 2, 2], [1, 68, 8, 8], [1, 68, 4, 4], [1, 68, 2, 2]] torch.float32 False"
    )


def test_a_batch_program_pads_as_the_onnx_file_does(checkpoint: Checkpoint, canvases: Any) -> None:
    nms = {"score_threshold": 0.6, "iou_threshold": 0.5, "pre_nms_top_k": 1000, "max_detections": 200}
    network = tracing.DetectingNetwork(RawNetwork(checkpoint.model), "batch", nms)
    with torch.no_grad():
        counts, boxes, scores, labels = network(torch.from_numpy(canvases))
    assert counts.shape == (3, 1)
    assert counts.min() > 0
    assert counts.max() < 200
    for i, n in enumerate(counts[:, 0].tolist()):
        assert (labels[i, :n] >= 0).all()
        assert all((padding == -1).all() for padding in (boxes[i, n:], scores[i, n:], labels[i, n:]))


# -- the check -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reference(checkpoint: Checkpoint, canvases: Any) -> parity.Reference:
    return parity.Reference(checkpoint.model, canvases)


def damaged(network: YoloNAS, by: float) -> YoloNAS:
    """With one bias of one box predictor off."""
    model = network.fused()
    model.heads.head1.reg_pred.bias.data[3] += by
    return model


def test_a_file_of_a_damaged_network_is_not_kept(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracing.torch_program
    monkeypatch.setattr("yolonas.export.torch_program", lambda model, manifest: real(damaged(model, 2.0), manifest))
    kept = tmp_path / "x.pt2"
    kept.write_bytes(b"what was here before")
    with pytest.raises(ExportError, match=r"x\.pt2 is not kept.*px \(allowed 0\.1\)") as caught:
        export(checkpoint, kept)
    assert "\n" not in str(caught.value)
    assert kept.read_bytes() == b"what was here before"
    assert list(tmp_path.iterdir()) == [kept]


def test_the_same_holds_for_a_file_with_nms(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tracing.torch_program
    monkeypatch.setattr("yolonas.export.torch_program", lambda model, manifest: real(damaged(model, 2.0), manifest))
    with pytest.raises(ExportError, match="is not kept"):
        export(checkpoint, tmp_path / "x.pt2", nms=True)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_is_found_a_twin_with_a_lower_threshold_is_compared(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    real = tracing.torch_program

    def program(model: YoloNAS, manifest: Manifest) -> torch.export.ExportedProgram:
        written.append(manifest.nms)
        return real(model, manifest)

    monkeypatch.setattr("yolonas.export.torch_program", program)
    exported = export(checkpoint, tmp_path / "x.pt2", nms=True, conf=1.0)
    assert exported.parity.compared > 20
    assert [nms["score_threshold"] < 1 for nms in written if nms] == [False, True]
    assert read_manifest(tmp_path / "x.pt2").nms["score_threshold"] == 1.0  # type: ignore[index]
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt2"]


def test_equal_maps_pass_and_small_differences_are_measured(
    reference: parity.Reference, raw_onnx: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = raw_onnx.manifest
    maps = [m.copy() for m in reference.maps]
    monkeypatch.setattr(parity, "run", lambda *_: maps)
    result = reference.compare(raw_onnx.path, manifest)
    assert (result.box, result.score, result.share, result.passed) == (0, 0, 1, True)
    maps[0][0, 0, 0, 0] += 0.1
    result = reference.compare(raw_onnx.path, manifest)
    assert 1e-3 < result.score < 0.1
    assert not result.passed
    maps[0][0, 0, 0, 0] = np.nan
    assert not reference.compare(raw_onnx.path, manifest).passed


def test_detections_are_compared_object_by_object(
    reference: parity.Reference, raw_onnx: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    nms = {"score_threshold": 0.5, "iou_threshold": 0.6, "pre_nms_top_k": 1000, "max_detections": 300}
    manifest = dataclasses.replace(raw_onnx.manifest, output="batch", nms=nms)
    found = decode(reference.maps, parity._decoding(nms))
    monkeypatch.setattr(parity, "run", lambda *_: None)
    given: list[Any] = []
    monkeypatch.setattr(parity, "detections", lambda *_: given)

    def compare(change: Any) -> parity.Parity:
        given[:] = [change(f._replace(boxes=f.boxes.copy(), labels=f.labels.copy())) for f in found]
        return reference.compare(raw_onnx.path, manifest)

    assert sum(len(f.scores) for f in found) > 50
    same = compare(lambda f: f)
    assert (same.box, same.score, same.share, same.passed) == (0, 0, 1, True)
    moved = compare(lambda f: f._replace(boxes=f.boxes + 0.05))
    assert moved.box == pytest.approx(0.05, abs=1e-4)
    assert moved.passed
    assert not compare(lambda f: f._replace(boxes=f.boxes + 0.5)).passed
    assert not compare(lambda f: f._replace(labels=(f.labels + 1) % 3)).passed
    assert not compare(lambda f: type(f)(f.boxes[10:], f.scores[10:], f.labels[10:])).passed
    assert not compare(lambda f: type(f)(f.boxes[:0], f.scores[:0], f.labels[:0])).passed
    assert not compare(lambda f: f._replace(boxes=f.boxes * np.nan)).passed


def test_int8_is_compared_by_the_share_of_objects_found(
    reference: parity.Reference, raw_onnx: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = reference.shown(dataclasses.replace(raw_onnx.manifest, precision="int8"))
    maps = [m.copy() for m in reference.maps]
    monkeypatch.setattr(parity, "run", lambda *_: maps)
    assert reference.compare(raw_onnx.path, manifest).share == 1
    for m in maps[3:]:
        m += np.random.default_rng(0).normal(0, 0.05, m.shape).astype(np.float32)
    assert reference.compare(raw_onnx.path, manifest).passed
    for m in maps[:3]:
        m[:] = np.roll(m, 1, axis=1)
    result = reference.compare(raw_onnx.path, manifest)
    assert not result.passed
    assert "same class, IoU over 0.5" in str(result)


def test_images_to_compare_on_are_those_given(checkpoint: Checkpoint, tmp_path: Path) -> None:
    preprocessing = checkpoint.model.preprocessing
    for i in range(10):
        write_image(tmp_path / f"{i}.png", np.full((30, 40, 3), 20 * i, dtype=np.uint8))
    given = parity.canvases(preprocessing, tmp_path)
    assert given.shape == (parity.MOST_IMAGES, 3, SIDE, SIDE)
    assert given[3, 0, SIDE // 2, SIDE // 2] == 60
    assert parity.canvases(preprocessing).shape == (parity.SAMPLES, 3, SIDE, SIDE)
    (tmp_path / "0.png").write_text("no picture")
    with pytest.raises(DataError, match=r"0\.png"):
        parity.canvases(preprocessing, tmp_path)


# -- int8, with a stand-in for NNCF: helper modules are tested where they are --------------------------------------


def test_int8_quantizes_with_the_images_of_the_data_set(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from yolonas.data.samples import generate

    generate(tmp_path / "data", 3, image_size=(128, 128))
    calls = []

    def quantize(given: Checkpoint, path: Path, images: list[Path], **_: Any) -> Manifest:
        calls.append((given, images))
        made = export_raw_onnx(given, path)
        return dataclasses.replace(made, precision="int8", record={**made.record, "quantization": {"preset": "full"}})

    stand_in = types.ModuleType("yolonas.quantization")
    stand_in.quantize = quantize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "yolonas.quantization", stand_in)
    exported = export(checkpoint, tmp_path / "x.xml", int8=True, nms=True, imgsz=96, batch=2, data=tmp_path / "data")
    ((given, images),) = calls
    assert given.model.preprocessing.image_size == (96, 96)
    assert checkpoint.model.preprocessing.image_size == (SIDE, SIDE)
    assert [path.name for path in images] == [f"parts_000{i}.jpg" for i in range(3)]
    assert exported.parity.images == 3
    assert exported.manifest.precision == read_manifest(exported.path).precision == "int8"
    assert read_manifest(exported.path).record["quantization"] == {"preset": "full"}

    (image,) = openvino_core().read_model(exported.path).inputs
    assert list(image.shape) == [2, 3, 96, 96]


# -- what cannot be had --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("x.txt", {}, r"x\.txt must end in \.onnx, \.xml, \.pt2"),
        ("x.onnx", {"format": "openvino"}, r"must end in \.xml for the format openvino"),
        ("x.onnx", {"format": "tflite"}, "format 'tflite' is not one of onnx, openvino, pt2"),
        ("x.onnx", {"half": True, "int8": True}, "half and int8 exclude each other"),
        ("x.pt2", {"int8": True}, "int8 is not made for pt2"),
        ("x.onnx", {"int8": True}, "int8 is calibrated on images"),
        ("x.onnx", {"int8": True, "data": "d", "input": "float"}, "an int8 network takes uint8 images"),
        ("x.onnx", {"imgsz": 100}, "imgsz 100 must be a multiple of 32"),
        ("x.onnx", {"batch": 0}, "batch must be a whole number of at least 1, not 0"),
        ("x.onnx", {"max_det": 0}, "max_det must be a whole number of at least 1, not 0"),
        ("x.onnx", {"conf": 1.5}, r"conf 1\.5 must lie in 0\.\.1"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    name: str, options: dict[str, Any], words: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        export(checkpoint, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("package", "name", "line"),
    [
        ("onnx", "x.onnx", r"an export to ONNX needs the package onnx, .*pip install 'yolonas\[onnx\]'"),
        ("onnxscript", "x.onnx", r"needs the package onnxscript, .*pip install 'yolonas\[onnx\]'"),
        ("onnxruntime", "x.onnx", r"needs the package onnxruntime, .*pip install 'yolonas\[onnx\]'"),
        ("openvino", "x.xml", r"an export to OpenVINO needs the package openvino, .*'yolonas\[openvino\]'"),
    ],
)
def test_a_missing_package_is_named_with_its_install_line(
    package: str, name: str, line: str, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=line):
        export(checkpoint, tmp_path / name)


def test_a_path_that_cannot_be_written_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/x\.pt2 cannot be written"):
        export(checkpoint, tmp_path / "file" / "x.pt2")
    (tmp_path / "x.pt2").mkdir()
    with pytest.raises(ExportError, match=r"x\.pt2 cannot be written: it is a folder"):
        export(checkpoint, tmp_path / "x.pt2")
