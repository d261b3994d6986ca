"""The detector end to end, against a slow path of its own and against itself under every way of calling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.errors import CheckpointError, DataError
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.device import resolve_device
from yolonas.inference.runtimes.torch import MOST_GRAPHS, _Preprocessed
from yolonas.model import Preprocessing, YoloNAS


@pytest.fixture(scope="module")
def detector(lively: Checkpoint) -> Detector:
    return Detector(dataclasses.replace(lively), device="cpu")


def picture(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Smooth blobs: every picture gets other boxes."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


SIZES = [(120, 160), (160, 120), (97, 33), (300, 310), (64, 64)]


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return [picture(i, *size) for i, size in enumerate(SIZES)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[np.ndarray]) -> Path:
    for i, image in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image[..., ::-1])
    return tmp_path


def assert_same(a: Detections, b: Detections, atol: float = 1e-2) -> None:
    assert a.image_size == b.image_size
    assert a.labels.tolist() == b.labels.tolist()
    np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=atol)


def slow_detections(
    model: YoloNAS, canvas: np.ndarray, metadata: tuple[float, int, int, int, int], conf: float, iou: float
) -> list[tuple[float, int, np.ndarray]]:
    """Training form, NumPy decoding, a plain NMS loop over each class; canvas [3, H, W] uint8 RGB."""
    with torch.no_grad():
        raw = model(torch.from_numpy(canvas.astype(np.float32)[None] / np.float32(255)))
    boxes, scores = [], []
    for stride, classes, sides in zip((8, 16, 32), raw.class_logits, raw.box_logits, strict=True):
        logits = classes[0].double().numpy()
        scores.append((1 / (1 + np.exp(-logits))).reshape(len(logits), -1).T)
        h, w = logits.shape[1:]
        bins = np.exp(sides[0].double().numpy().reshape(4, 17, h, w))
        left, top, right, bottom = (bins * np.arange(17)[None, :, None, None]).sum(1) / bins.sum(1)
        y, x = np.mgrid[:h, :w] + 0.5
        boxes.append(np.stack([x - left, y - top, x + right, y + bottom], axis=-1).reshape(-1, 4) * stride)
    boxes, scores = np.concatenate(boxes), np.concatenate(scores)
    pairs = sorted(zip(*np.nonzero(scores > conf), strict=True), key=lambda pair: -scores[pair])[:1000]
    kept: list[tuple[int, int]] = []
    for anchor, label in pairs:
        a = boxes[anchor]
        for other, other_label in kept:
            b = boxes[other]
            shared = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
            union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
            if label == other_label and shared / union > iou:
                break
        else:
            kept.append((anchor, label))
    scale, left, top, height, width = metadata
    return [
        (
            scores[anchor, label],
            label,
            np.clip((boxes[anchor] - [left, top, left, top]) / scale, 0, [width, height, width, height]),
        )
        for anchor, label in kept[:300]
    ]


def test_equals_a_slow_path_on_a_photograph(shared: Path, golden_s: YoloNAS) -> None:
    name, metadata = "000000000072", (0.99375, 108, 2, 640, 427)  # of the reference's own letterbox
    canvas = np.load(shared / f"vectors/preproc_{name}.npz")["chw_uint8_rgb"]
    conf, iou = 0.85, 0.6
    expected = slow_detections(golden_s, canvas, metadata, conf, iou)
    path = shared / "data/coco_permissive/images" / f"{name}.jpg"
    found = Detector(golden_s, "cpu")(path, conf=conf, iou=iou)
    assert 20 < len(expected) == len(found) < 300
    np.testing.assert_allclose(found.scores, [score for score, _, _ in expected], atol=1e-5)
    assert found.labels.tolist() == [label for _, label, _ in expected]
    np.testing.assert_allclose(found.boxes, [box for _, _, box in expected], atol=2e-3)
    assert found.image_size == (640, 427)
    assert found.path == str(path)


def test_boxes_are_in_the_image_best_first(detector: Detector, pictures: list[np.ndarray]) -> None:
    for image, found in zip(pictures, detector(pictures), strict=True):
        height, width = image.shape[:2]
        assert 0 < len(found) <= 300
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [width, height, width, height]).all()
        assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()  # none that lies in the padding altogether
        assert (np.diff(found.scores) <= 0).all()
        assert (found.scores > 0.6).all()


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_the_batch_size_changes_nothing(detector: Detector, pictures: list[np.ndarray], batch: int) -> None:
    for single, found in zip(map(detector, pictures), detector(pictures, batch=batch), strict=True):
        assert_same(found, single)
    for single, found in zip(map(detector, pictures), detector.predict_batch(pictures, batch=batch), strict=True):
        assert_same(found, single)


def test_files_bytes_and_arrays_are_one(detector: Detector, folder: Path, pictures: list[np.ndarray]) -> None:
    file = folder / "0.png"
    expected = detector(pictures[0])
    for source in (file, str(file), file.read_bytes()):
        assert_same(detector(source), expected, atol=0)
    for source in (folder, str(folder / "*.png"), [str(folder)], sorted(folder.iterdir())):
        found = detector(source)
        assert [d.path for d in found] == [str(folder / f"{i}.png") for i in range(5)]
        assert_same(found[0], expected)
    assert isinstance(detector(np.stack([pictures[0]] * 2)), list)
    assert detector([]) == []


def test_pixels_are_kept_only_where_nothing_else_has_them(detector: Detector, folder: Path) -> None:
    assert detector(folder / "0.png").image is not None
    assert all(d.image is None for d in detector(folder))
    assert detector([(folder / "0.png").read_bytes()])[0].image is not None
    assert all(d.image is not None for d in detector.stream(folder))
    detector(folder)[1].plot()


def test_a_turned_photograph_gets_the_boxes_of_the_upright_one(detector: Detector, tmp_path: Path) -> None:
    upright = picture(7, 200, 100)
    exif = Image.Exif()
    exif[0x0112] = 6  # the stored pixels are to be turned clockwise
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "turned.png", exif=exif)
    found = detector(tmp_path / "turned.png")
    assert found.image_size == (200, 100)
    assert_same(found, detector(upright))


def test_thresholds_default_to_the_checkpoints(detector: Detector, pictures: list[np.ndarray]) -> None:
    image = pictures[0]
    assert_same(detector(image), detector(image, conf=0.6, iou=0.5))
    assert len(detector(image, conf=0.5)) > len(detector(image)) > len(detector(image, conf=0.7))
    assert len(detector(image, iou=0.9)) > len(detector(image)) > len(detector(image, iou=0.1))
    assert len(detector(image, max_det=3)) == 3
    assert len(detector(image, conf=0.0, iou=1.0, max_det=1500)) > 1000


def test_imgsz(detector: Detector, pictures: list[np.ndarray]) -> None:
    assert len(detector(pictures[0], imgsz=320)) != len(detector(pictures[0]))
    assert detector(pictures[0], imgsz=(96, 320)).image_size == (120, 160)
    assert detector._preprocessing(320) == Preprocessing(image_size=(320, 320), resize_to=317)
    # The published preprocessing is 636 in 640 px.
    assert Detector(YoloNAS("n"), "cpu")._preprocessing(320) == Preprocessing(image_size=(320, 320), resize_to=318)
    assert detector._preprocessing(None) == detector.checkpoint.model.preprocessing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conf": 1.5}, r"conf must lie in 0\.\.1, not 1.5"),
        ({"iou": -0.1}, r"iou must lie in 0\.\.1, not -0.1"),
        ({"conf": float("nan")}, r"conf must lie in 0\.\.1, not nan"),
        ({"imgsz": 333}, "imgsz 333 must be a multiple of 32"),
        ({"imgsz": 0}, "imgsz 0 must be a multiple of 32"),
        ({"max_det": 0}, "max_det must be a whole number of at least 1, not 0"),
        ({"batch": 0}, "batch must be a whole number of at least 1, not 0"),
    ],
)
def test_options_out_of_range(detector: Detector, options: dict, message: str) -> None:
    for call in (detector, detector.stream, detector.predict_batch):
        with pytest.raises(ValueError, match=message):
            call([picture(0)], **options)


def test_preprocessing_of_the_checkpoint_is_used(lively: Checkpoint, pictures: list[np.ndarray]) -> None:
    state = lively.model.state_dict()

    def detections(image: np.ndarray, **changes: object) -> Detections:
        preprocessing = dataclasses.replace(Preprocessing.square(160), **changes)
        model = YoloNAS("n", 3, preprocessing=preprocessing)
        model.load_state_dict(state)
        return Detector(model, "cpu")(image, conf=0.6)

    image = pictures[0]
    plain = detections(image)
    assert_same(detections(image[..., ::-1].copy(), channels="bgr"), plain)
    assert_same(detections(image, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), plain)
    shifted = detections(image, mean=(0.1, 0.2, 0.3), std=(2.0, 1.0, 0.5))
    assert len(shifted) != len(plain) or not np.allclose(shifted.scores, plain.scores)


def test_normalization_per_channel() -> None:
    canvases = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 64), dtype=np.uint8)
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(2.0, 1.0, 0.5))
    network = _Preprocessed(YoloNAS("n", 3, preprocessing=preprocessing), torch.float32)
    taken = []
    network.model.register_forward_pre_hook(lambda module, inputs: taken.extend(inputs))
    network(torch.from_numpy(canvases))
    expected = (canvases.transpose(0, 2, 3, 1) / 255 - [0.1, 0.2, 0.3]) / [2.0, 1.0, 0.5]
    np.testing.assert_allclose(taken[0].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert taken[0].is_contiguous(memory_format=torch.channels_last)


def test_the_network_runs_fused_and_the_checkpoint_stays_as_it_was(detector: Detector, lively: Checkpoint) -> None:
    network = detector.runtime._network.model
    assert network.form == "fused"
    assert not network.training
    assert detector.checkpoint.model.form == "training"
    assert detector.names == ("cat", "dog", "bird")
    fused = Checkpoint(lively.model.fused(), conf=0.6, iou=0.5)
    assert_same(Detector(fused, "cpu")(picture(0)), detector(picture(0)))


def test_weights_from_a_file(detector: Detector, lively: Checkpoint, tmp_path: Path) -> None:
    checkpoint.save(lively, tmp_path / "n.safetensors")
    for weights in (tmp_path / "n.safetensors", str(tmp_path / "n.safetensors")):
        loaded = Detector(weights, "cpu")
        assert (loaded.checkpoint.conf, loaded.names) == (0.6, ("cat", "dog", "bird"))
        assert_same(loaded(picture(0)), detector(picture(0)))
    (tmp_path / "bad.safetensors").write_bytes(b"none of it")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        Detector(tmp_path / "bad.safetensors")


def test_many_threads_get_their_own_results(detector: Detector, pictures: list[np.ndarray]) -> None:
    expected = [detector(image) for image in pictures]
    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(threads.map(detector, pictures * 3)):
            assert_same(found, expected[i % len(pictures)])


def damage(folder: Path) -> None:
    (folder / "1.png").write_bytes(b"no image")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:500])


def test_an_unreadable_image_costs_nothing_else(detector: Detector, folder: Path) -> None:
    damage(folder)
    errors: list[DataError] = []
    found = list(detector.stream(folder, batch=2, on_error=errors.append))
    assert [Path(str(d.path)).name for d in found] == ["0.png", "2.png", "4.png"]
    assert ["1.png" in str(errors[0]), "3.png" in str(errors[1])] == [True, True]
    got = []
    with pytest.raises(DataError, match=r"2 images could not be read: .*1\.png.*; .*3\.png"):
        got.extend(d.path for d in detector.stream(folder))
    with pytest.raises(DataError, match=r"1\.png"):
        detector(folder)
    with pytest.raises(DataError, match=r"1\.png"):
        detector(folder / "1.png")


def test_without_a_callback_the_readable_ones_come_first(detector: Detector, folder: Path) -> None:
    damage(folder)
    stream = detector.stream(folder, batch=2)
    assert [Path(str(next(stream).path)).name for _ in range(3)] == ["0.png", "2.png", "4.png"]
    with pytest.raises(DataError, match="2 images"):
        next(stream)


def test_a_stream_reads_one_batch_ahead(detector: Detector) -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield picture(0)

    stream = detector.stream(endless(), batch=3, imgsz=64)
    next(stream)
    assert taken == 3
    for _ in range(3):
        next(stream)
    assert taken == 6


@pytest.mark.parametrize("name", ["tpu", "", "cuda:99", "99", "mps", "cpu:x"])
def test_unknown_devices_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' (is not known|does not exist)"):
        resolve_device(name)


def test_known_devices(lively: Checkpoint) -> None:
    assert resolve_device("CPU") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="runtime 'tensorrt' is not known"):
        Detector(lively, "cpu", runtime="tensorrt")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "atol"), [("fp32", 5e-3), ("fp16", 2e-2), ("bf16", 1e-1)])  # fp32: or TF32
def test_cuda_finds_what_the_cpu_finds(
    detector: Detector, lively: Checkpoint, pictures: list[np.ndarray], precision: str, atol: float
) -> None:
    cuda = Detector(lively, "cuda", precision=precision)
    assert (cuda.device, cuda.runtime.precision) == ("cuda", precision)
    for _ in range(3):  # as it comes, captured, replayed
        for a, b in zip(cuda(pictures), detector(pictures), strict=True):
            np.testing.assert_allclose(a.scores[:10], b.scores[:10], atol=atol)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_of_several_shapes_and_thresholds(lively: Checkpoint, pictures: list[np.ndarray]) -> None:
    cuda, plain = Detector(lively, "cuda", precision="fp32"), Detector(lively, "cuda", precision="fp32")
    for k in range(4):
        for conf in (0.5, 0.7):
            for count in (1, 3):
                part = [pictures[(k + i) % len(pictures)] for i in range(count)]
                plain.runtime._graphs.clear()  # so that it runs each as it comes
                for a, b in zip(cuda(part, conf=conf), plain(part, conf=conf), strict=True):
                    np.testing.assert_allclose(a.scores[:10], b.scores[:10], atol=5e-3)
    assert len(cuda.runtime._graphs) == MOST_GRAPHS
    assert all(graph is not None for graph in cuda.runtime._graphs.values())
    cuda(pictures[0], conf=0.65)
    assert len(cuda.runtime._graphs) == MOST_GRAPHS
