"""The runtimes: one network, one result, whatever runs it and wherever it was stored."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.errors import CheckpointError, DataError, ExportError, MissingPackageError
from yolonas.exported import METADATA_KEY, Manifest
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.runtimes import Decoding, cache, choice
from yolonas.inference.runtimes.exported import ExportedRuntime
from yolonas.inference.sources import IMAGE_SUFFIXES
from yolonas.model import Preprocessing, YoloNAS
from yolonas.weights import resolve

EXPORTED = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of exported networks that the tests of this file share."""
    home = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def onnx_file(lively: Checkpoint, cache_home: Path) -> Path:
    return cache.exported(lively)


@pytest.fixture(scope="module")
def detector(lively: Checkpoint) -> Detector:
    return Detector(lively, "cpu")


def picture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC)


PICTURES = [picture(i) for i in range(5)]


def assert_same(a: Detections, b: Detections) -> None:
    """Within 0.1 px and 1e-3, but for boxes whose score is that near to the threshold or to that of another."""
    for one, other in ((a, b), (b, a)):
        lowest = one.scores.min() + 1e-3 if len(one) else 1
        for found in one[one.scores > lowest]:
            near = (np.abs(other.boxes - found.box) <= 0.1).all(axis=1) & (np.abs(other.scores - found.score) <= 1e-3)
            assert (near & (other.labels == found.label)).any(), found


@pytest.mark.parametrize("runtime", EXPORTED)
def test_float32_finds_the_same_on_photographs(shared: Path, runtime: str, cache_home: Path) -> None:
    weights = "yolo_nas_n_bccd"
    torch_one, other = Detector(weights, "cpu", "torch"), Detector(weights, "cpu", runtime)
    assert (other.runtime.name, other.runtime.precision, other.device) == (runtime, "fp32", "cpu")
    assert other.manifest == torch_one.manifest
    folders = [shared / "data" / name for name in ("bccd", "coco_permissive")]
    images = [p for f in folders for p in sorted(f.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    boxes = 0
    for a, b in zip(torch_one.stream(images[::25], conf=0.05), other.stream(images[::25], conf=0.05), strict=True):
        assert_same(a, b)
        boxes += len(a)
    assert boxes > 100


@pytest.mark.slow
@pytest.mark.parametrize("runtime", EXPORTED)
def test_float32_finds_the_same_with_s(shared: Path, golden_s: YoloNAS, runtime: str, cache_home: Path) -> None:
    images = sorted((shared / "data/coco_permissive/images").glob("*.jpg"))[:20]
    pairs = zip(*(Detector(golden_s, "cpu", name).stream(images, conf=0.8) for name in ("torch", runtime)), strict=True)
    for a, b in pairs:
        assert_same(a, b)


@pytest.mark.parametrize("runtime", EXPORTED)
def test_a_checkpoint_is_exported_once(
    lively: Checkpoint, detector: Detector, onnx_file: Path, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolonas.export.export_raw_onnx", None)
    other = Detector(lively, "cpu", runtime)
    for image in PICTURES:
        assert_same(detector(image), other(image))
    for a, b in zip(detector(PICTURES, imgsz=(96, 224)), other(PICTURES, imgsz=(96, 224), batch=2), strict=True):
        assert_same(a, b)
    assert other.checkpoint is lively


@pytest.mark.parametrize("runtime", ["torch", *EXPORTED])
def test_classes_and_agnostic_nms(lively: Checkpoint, detector: Detector, onnx_file: Path, runtime: str) -> None:
    other = Detector(lively, "cpu", runtime)
    for image in PICTURES:
        full = detector(image, conf=0.4, max_det=5000)
        for classes in ([0], [2, 1]):
            (found,) = other.stream(image, conf=0.4, max_det=5000, classes=classes)
            assert_same(full[np.isin(full.labels, classes)], found)
            assert set(found.labels) <= set(classes)
        agnostic = other(image, conf=0.4, max_det=5000, agnostic_nms=True)
        assert_same(detector(image, conf=0.4, max_det=5000, agnostic_nms=True), agnostic)
        assert 0 < len(agnostic) < len(full)
    with pytest.raises(ValueError, match="classes must be numbers from 0 to 2, not 3"):
        other(PICTURES[0], classes=[3])


def as_xml(onnx_file: Path, folder: Path) -> Path:
    import openvino

    model = openvino.convert_model(onnx_file)
    model.set_rt_info(_manifest(onnx_file).to_json(), METADATA_KEY)
    openvino.save_model(model, folder / "n.xml", compress_to_fp16=False)
    return folder / "n.xml"


def _manifest(path: Path) -> Manifest:
    from yolonas.exported import read_manifest

    return read_manifest(path)


def as_pt2(onnx_file: Path, lively: Checkpoint, folder: Path) -> Path:
    from yolonas.tracing import RawNetwork

    side = [32 * torch.export.Dim(name) for name in ("height", "width")]
    sizes = ({0: torch.export.Dim("batch"), 2: side[0], 3: side[1]},)
    example = torch.zeros(2, 3, 64, 96, dtype=torch.uint8)
    program = torch.export.export(RawNetwork(lively.model).eval(), (example,), dynamic_shapes=sizes)
    torch.export.save(program, folder / "n.pt2", extra_files={METADATA_KEY: _manifest(onnx_file).to_json()})
    return folder / "n.pt2"


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_an_exported_file_is_weights(
    suffix: str, onnx_file: Path, lively: Checkpoint, detector: Detector, tmp_path: Path
) -> None:
    if suffix == ".onnx":
        weights, runtimes = onnx_file, ("auto", "onnxruntime", "openvino")
    elif suffix == ".xml":
        weights, runtimes = as_xml(onnx_file, tmp_path), ("auto", "openvino")
    else:
        weights, runtimes = as_pt2(onnx_file, lively, tmp_path), ("auto", "torch")
    for runtime in runtimes:
        loaded = Detector(str(weights), "cpu", runtime)
        assert loaded.names == ("cat", "dog", "bird")
        assert (loaded.checkpoint.conf, loaded.checkpoint.iou, loaded.checkpoint.license) == (0.6, 0.5, None)
        for image in PICTURES:
            assert_same(detector(image), loaded(image))
    for runtime in set(choice.RUNTIMES) - set(runtimes):
        with pytest.raises(ValueError, match=f"runtime '{runtime}' does not run .*{suffix}: use "):
            Detector(weights, "cpu", runtime)


def test_auto_takes_openvino_for_onnx(onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Detector(onnx_file).runtime.name == "openvino"
    monkeypatch.setattr(choice, "_installed", lambda package: package == "onnxruntime")
    assert Detector(onnx_file).runtime.name == "onnxruntime"


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_bfloat16_when_asked(lively: Checkpoint, detector: Detector, onnx_file: Path, runtime: str) -> None:
    half = Detector(lively, "cpu", runtime, "bf16")
    assert half.runtime.precision == "bf16"
    for image in PICTURES:
        a, b = detector(image, conf=0.5), half(image, conf=0.5)
        np.testing.assert_allclose(a.scores[:10], b.scores[:10], atol=0.02)
        assert not np.array_equal(a.scores[:10], b.scores[:10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "precision 'int4' is not known: use auto, fp32, fp16, bf16"),
        ({"precision": "fp16", "runtime": "torch"}, "precision 'fp16' is slow on a CPU"),
        ({"precision": "bf16", "runtime": "onnxruntime"}, "precision 'bf16' is not what runtime 'onnxruntime' has"),
        ({"precision": "fp16", "runtime": "openvino"}, "precision 'fp16' is not what .* use auto, fp32, bf16"),
        ({"device": "cuda", "runtime": "openvino"}, "runtime 'openvino' runs on the CPU here, not on device 'cuda'"),
        ({"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ({"compile": True, "runtime": "openvino"}, "compile is of runtime 'torch'"),
    ],
)
def test_options_that_do_not_go_together(lively: Checkpoint, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Detector(lively, **{"device": "cpu"} | options)


def test_a_file_of_others_is_named(tmp_path: Path, onnx_file: Path) -> None:
    (tmp_path / "damaged.onnx").write_bytes(onnx_file.read_bytes()[:-100])
    (tmp_path / "empty.onnx").write_bytes(b"")
    for name in ("damaged.onnx", "empty.onnx"):
        for runtime in EXPORTED:
            with pytest.raises(CheckpointError, match=name):
                Detector(tmp_path / name, "cpu", runtime)


@pytest.mark.parametrize(("runtime", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_runtime_is_named(runtime: str, extra: str, onnx_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(MissingPackageError, match=rf"runtime '{runtime}' needs .* pip install 'yolonas\[{extra}\]'"):
        Detector(onnx_file, "cpu", runtime)


# The cache of exported networks


def test_the_key_is_of_all_that_matters(lively: Checkpoint) -> None:
    names = YoloNAS("n", 3, class_names=("a", "b", "c"), preprocessing=lively.model.preprocessing)
    names.load_state_dict(lively.model.state_dict())
    other = YoloNAS("n", 3, class_names=lively.model.class_names)
    other.load_state_dict(lively.model.state_dict())
    changed = YoloNAS("n", 3, class_names=lively.model.class_names, preprocessing=lively.model.preprocessing)
    state = lively.model.state_dict()
    state["heads.head1.cls_pred.bias"] = state["heads.head1.cls_pred.bias"] + 1e-6
    changed.load_state_dict(state)
    others = [
        dataclasses.replace(lively, conf=0.61),
        *(dataclasses.replace(lively, model=model) for model in (names, other, changed)),
    ]
    assert cache.key(lively) == cache.key(dataclasses.replace(lively))
    assert len({cache.key(c) for c in [lively, *others]}) == 5


def test_old_files_are_deleted(lively: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("yolonas.export.export_raw_onnx", lambda checkpoint, path: path.write_bytes(b"x"))
    now = time.time()
    variants = [dataclasses.replace(lively, conf=i / 100) for i in range(cache.MOST_FILES + 3)]
    for i, variant in enumerate(variants):
        path = cache.exported(variant)
        os.utime(path, (now - 1000 + i, now - 1000 + i))
        if i == cache.MOST_FILES - 1:
            cache.exported(variants[0])  # used again
    left = {path.stem for path in cache.folder().iterdir()}
    assert len(left) == cache.MOST_FILES
    assert {cache.key(variants[0]), cache.key(variants[-1])} <= left
    assert cache.key(variants[1]) not in left


def test_a_folder_that_cannot_be_written(lively: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "yolonas").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ExportError, match=r"cannot be written to .*yolonas/exported .*: set XDG_CACHE_HOME"):
        Detector(lively, "cpu", "openvino")


# "auto"


def test_a_long_job_goes_on_in_the_quickest_runtime(
    lively: Checkpoint, onnx_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "LONG", 0.0)
    caplog.set_level(logging.INFO, "yolonas")
    auto = Detector(lively, "cpu")
    assert (auto.runtime.name, auto.choice.milliseconds, auto.choice.report()) == ("torch", {}, "")
    expected = [auto(image) for image in PICTURES]
    assert auto.runtime.name == "torch"  # single images are no job
    found = list(auto.stream(PICTURES, batch=1))
    assert set(auto.choice.milliseconds) == {"torch", "openvino", "onnxruntime"}
    assert auto.runtime.name == min(auto.choice.milliseconds, key=auto.choice.milliseconds.get)
    assert f"Runtime {auto.runtime.name}: milliseconds for an image are" in caplog.text
    for a, b in zip(expected, found, strict=True):
        assert_same(a, b)


def test_a_short_job_exports_nothing(lively: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "open_runtime", _only_torch)
    auto = Detector(lively, "cpu")
    assert len(list(auto.stream(PICTURES))) == 5
    assert auto.runtime.name == "torch"


def _only_torch(name: str, *arguments: object) -> object:
    assert name == "torch"
    return choice._open_torch(arguments[0], *arguments[2:])


def test_a_job_goes_on_where_others_cannot_be_had(
    lively: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "yolonas").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "LONG", 0.0)
    auto = Detector(lively, "cpu")
    assert len(list(auto.stream(PICTURES, batch=1))) == 5
    assert set(auto.choice.milliseconds) == {"torch"}


# Files that are bound to a batch or a size, or decode themselves


class Recorded(ExportedRuntime):
    """Stands for a file: gives `outputs(images)`, and keeps what it was given."""

    name, precision = "openvino", "fp32"

    def __init__(self, manifest: Manifest, outputs: object) -> None:
        super().__init__(manifest, None)
        self.outputs, self.given = outputs, []

    def infer(self, images: np.ndarray) -> list[np.ndarray]:
        self.given.append(images)
        return self.outputs(images)


PLAIN = Manifest("n", ("a", "b"), Preprocessing.square(64), 0.3, 0.7)
NMS = {"score_threshold": 0.3, "iou_threshold": 0.5, "pre_nms_top_k": 1000, "max_detections": 3}
ROWS = np.array([[1, 2, 3, 4, 0.5, 0], [5, 6, 7, 8, 0.9, 1], [1, 1, 2, 2, 0.4, 1]], np.float32)  # not in order


def flat(images: np.ndarray) -> list[np.ndarray]:
    return [np.concatenate([np.insert(ROWS[: i + 1], 0, i, axis=1) for i in range(len(images))]).astype(np.float32)]


def batch(images: np.ndarray) -> list[np.ndarray]:
    counts = [min(i + 1, 3) for i in range(len(images))]
    padded = np.full((len(images), 3, 6), -1, np.float32)
    for i, n in enumerate(counts):
        padded[i, :n] = ROWS[:n]
    return [np.array(counts)[:, None], padded[..., :4], padded[..., 4], padded[..., 5].astype(np.int64)]


@pytest.mark.parametrize("outputs", [flat, batch])
def test_detections_of_the_file_itself(outputs: object) -> None:
    manifest = dataclasses.replace(PLAIN, output=outputs.__name__, nms=NMS)
    runtime = Recorded(manifest, outputs)
    found = runtime.detect(runtime.allocate(3, 64, 64), Decoding(0.3, 0.5))
    assert [f.scores.tolist() for f in found] == [
        pytest.approx(scores) for scores in ([0.5], [0.9, 0.5], [0.9, 0.5, 0.4])
    ]
    assert found[2].labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(found[1].boxes, [[5, 6, 7, 8], [1, 2, 3, 4]])
    found = runtime.detect(runtime.allocate(3, 64, 64), Decoding(0.45, 0.5, max_det=1))
    assert [f.scores.tolist() for f in found] == [pytest.approx([s]) for s in (0.5, 0.9, 0.9)]


@pytest.mark.parametrize("outputs", [flat, batch])
def test_classes_of_a_file_with_nms(outputs: object) -> None:
    runtime = Recorded(dataclasses.replace(PLAIN, output=outputs.__name__, nms=NMS), outputs)
    found = runtime.detect(runtime.allocate(3, 64, 64), Decoding(0.3, 0.5, hidden=(1,)))
    assert [f.labels.tolist() for f in found] == [[0]] * 3


def test_a_bound_batch_is_filled_up() -> None:
    runtime = Recorded(dataclasses.replace(PLAIN, batch=2, output="flat", nms=NMS), flat)
    canvases = np.random.default_rng(0).integers(1, 256, (3, 3, 64, 64), dtype=np.uint8)
    found = runtime.detect(canvases, Decoding(0.3, 0.5))
    assert [len(f.scores) for f in found] == [1, 2, 1]
    assert [images.shape for images in runtime.given] == [(2, 3, 64, 64)] * 2
    np.testing.assert_array_equal(np.concatenate(runtime.given)[:3], canvases)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_float_input_is_a_fraction(dtype: str) -> None:
    runtime = Recorded(dataclasses.replace(PLAIN, input=dtype, output="flat", nms=NMS), flat)
    canvases = np.arange(3 * 64 * 64, dtype=np.uint8).reshape(1, 3, 64, 64)
    runtime.detect(canvases, Decoding(0.3, 0.5))
    assert runtime.given[0].dtype == dtype
    np.testing.assert_allclose(runtime.given[0], canvases / 255, atol=1e-3)


def of(manifest: Manifest, onnx_file: Path, outputs: object = flat) -> Detector:
    detector = Detector(onnx_file)
    detector.manifest, detector.names = manifest, manifest.class_names
    detector.choice.current = Recorded(manifest, outputs)
    return detector


def test_thresholds_of_a_file_with_nms(onnx_file: Path) -> None:
    detector = of(dataclasses.replace(PLAIN, output="flat", nms=NMS), onnx_file)
    image = np.zeros((64, 64, 3), np.uint8)
    assert len(detector([image] * 3)[2]) == 3
    assert len(detector([image] * 3, conf=0.45, iou=0.5)[2]) == 2
    with pytest.raises(ValueError, match=r"conf 0\.2 is below 0\.3"):
        detector(image, conf=0.2)
    with pytest.raises(ValueError, match="agnostic_nms is not what this file does"):
        detector(image, agnostic_nms=True)
    with pytest.raises(ValueError, match=r"iou 0\.7 is not 0\.5"):
        detector(image, iou=0.7)


def test_the_size_of_a_bound_file(onnx_file: Path) -> None:
    bound = dataclasses.replace(PLAIN, image_size=(32, 64), output="flat", nms=NMS)
    detector = of(bound, onnx_file)
    detector(np.zeros((64, 64, 3), np.uint8))
    detector(np.zeros((64, 64, 3), np.uint8), imgsz=(32, 64))
    assert {images.shape for images in detector.runtime.given} == {(1, 3, 32, 64)}
    with pytest.raises(ValueError, match=r"imgsz 64 is not \(32, 64\), to which this file is bound"):
        detector(np.zeros((64, 64, 3), np.uint8), imgsz=64)


# Without torch

WITHOUT_TORCH = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from yolonas import Detector
for runtime in ("auto", "onnxruntime", "openvino"):
    detector = Detector(sys.argv[1], runtime=runtime)
    found = list(detector.stream([sys.argv[2]] * 3, batch=2))
    assert len(found) == 3
    print(*(f"{score:.4f}" for score in detector(sys.argv[2]).scores))
assert "torch" not in sys.modules
"""


def test_an_exported_file_needs_no_torch(onnx_file: Path, detector: Detector, tmp_path: Path) -> None:
    image = tmp_path / "0.png"
    cv2.imwrite(str(image), PICTURES[0])
    command = [sys.executable, "-c", WITHOUT_TORCH, str(onnx_file), str(image)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = detector(image).scores
    assert len(expected) > 5
    for line in run.stdout.splitlines():
        np.testing.assert_allclose([float(word) for word in line.split()], expected, atol=1e-3)
    assert len(run.stdout.splitlines()) == 3


SIGNALS = """
import gc, signal, subprocess, sys
from yolonas import Detector
signal.signal(signal.SIGCHLD, lambda *_: None)
for _ in range(3):
    one, other = (Detector(sys.argv[1], runtime="openvino") for _ in range(2))
    del one
    gc.collect()
    del other
    gc.collect()
    subprocess.run([sys.executable, "-c", ""], check=True)
"""


def test_detectors_that_come_and_go_leave_signals_alone(onnx_file: Path) -> None:
    run = subprocess.run([sys.executable, "-c", SIGNALS, str(onnx_file)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr}"


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("runtime", "images"),
    [
        ("torch", 300),
        ("openvino", 300),
        *(pytest.param(name, 5000, marks=pytest.mark.slow) for name in ("torch", *EXPORTED)),
    ],
)
def test_memory_does_not_grow_with_the_folder(
    lively: Checkpoint, runtime: str, images: int, tmp_path: Path, cache_home: Path
) -> None:
    files = [tmp_path / f"{i}.jpg" for i in range(20)]
    for i, file in enumerate(files):
        cv2.imwrite(str(file), cv2.resize(picture(i), (1280, 960 - 16 * i)))
    checkpoint.save(lively, tmp_path / "n.safetensors")
    # In a process of its own, as memory that other tests have freed would hide some growth.
    script = Path(__file__).with_name("memory_run.py")
    command = [sys.executable, script, tmp_path / "n.safetensors", runtime, str(images), tmp_path]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    levels = json.loads(run.stdout)
    print(f"{runtime}: {images} images, resident MB {levels}")
    assert max(levels[5:]) - max(levels[2:5]) < 15, levels


def test_unreadable_images_in_order(lively: Checkpoint, tmp_path: Path) -> None:
    for i in range(12):
        cv2.imwrite(str(tmp_path / f"{i:02}.png"), PICTURES[i % 5])
    for i in (0, 5, 6, 7, 8, 11):
        (tmp_path / f"{i:02}.png").write_bytes(b"none")
    seen: list[str] = []
    detector = Detector(lively, "cpu")

    def report(error: DataError) -> None:
        seen.append(f"!{Path(str(error).split()[0]).stem}")

    for detections in detector.stream(tmp_path, batch=2, on_error=report):
        seen.append(Path(str(detections.path)).stem)
    assert seen == [f"{'!' if i in (0, 5, 6, 7, 8, 11) else ''}{i:02}" for i in range(12)]


def test_an_error_that_stops_the_job_ends_it(lively: Checkpoint, tmp_path: Path) -> None:
    for i in range(6):
        cv2.imwrite(str(tmp_path / f"{i}.png"), PICTURES[0])
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"3\.png is empty"):
        Detector(lively, "cpu")(tmp_path, batch=1)


def test_saved_and_exported_files_agree_on_what_they_are(lively: Checkpoint, onnx_file: Path, tmp_path: Path) -> None:
    checkpoint.save(lively, tmp_path / "n.safetensors")
    assert Detector(tmp_path / "n.safetensors", "cpu").manifest == Detector(onnx_file).manifest
    assert resolve(str(onnx_file)) == onnx_file
