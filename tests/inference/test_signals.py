"""Signals of boxes and images: gathered from the right places of the raw maps, the same on every runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolonas.active_learning import ImageSignals, box_spread, class_doubt
from yolonas.checkpoint import Checkpoint
from yolonas.data.readers import read_dataset
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.runtimes import Decoding, Found, decode
from yolonas.inference.signals import looks, with_signals
from yolonas.inference.sources import read_image
from yolonas.model.config import STRIDES
from yolonas.ops import numpy as npops

CLASSES, BINS = 4, 17
DECODING = Decoding(0.3, 0.6, max_det=20, signals=True)


def picture(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (160, 120), interpolation=cv2.INTER_CUBIC)


PICTURES = [picture(i) for i in range(5)]


def raw_maps(batch: int, size: tuple[int, int] = (64, 96)) -> list[np.ndarray]:
    rng = np.random.default_rng(batch)
    grids = [(size[0] // stride, size[1] // stride) for stride in STRIDES]
    classes = [rng.normal(-4, 3, (batch, CLASSES, *grid)).astype(np.float32) for grid in grids]
    return classes + [rng.normal(0, 2, (batch, 4 * BINS, *grid)).astype(np.float32) for grid in grids]


def test_signals_are_those_of_each_boxs_anchor() -> None:
    maps = raw_maps(3)
    plain = decode(maps, dataclasses.replace(DECODING, signals=False))
    anchors = npops.decode_nms(
        maps[:3], maps[3:], STRIDES, score_threshold=0.3, iou_threshold=0.6, max_detections=20
    ).anchors
    flat_classes = np.concatenate([m.reshape(3, CLASSES, -1) for m in maps[:3]], axis=2)
    flat_boxes = np.concatenate([m.reshape(3, 4, BINS, -1) for m in maps[3:]], axis=3)
    strides = np.concatenate([np.full(m[0, 0].size, s) for m, s in zip(maps[:3], STRIDES, strict=True)])
    levels = set()
    for image, (found, without) in enumerate(zip(decode(maps, DECODING), plain, strict=True)):
        assert without.signals is None
        assert len(found.scores) > 3
        np.testing.assert_array_equal(found.boxes, without.boxes)
        signals = found.signals
        assert signals is not None
        for row, anchor in enumerate(anchors[image, : len(found.scores)]):
            logits = flat_classes[image, :, anchor]
            assert 1 / (1 + np.exp(-logits[found.labels[row]])) == pytest.approx(found.scores[row], abs=1e-5)
            margins, entropies, rivals = class_doubt(logits[None], [found.labels[row]])
            assert signals.margins[row] == pytest.approx(margins[0])
            assert signals.entropies[row] == pytest.approx(entropies[0])
            assert signals.rivals[row] == rivals[0]
            box_logits = flat_boxes[image, :, :, anchor].reshape(1, 4, BINS)
            spread = box_spread(box_logits, [strides[anchor]], found.boxes[row : row + 1])
            assert signals.spreads[row] == pytest.approx(spread[0], rel=1e-4)
            levels.add(int(strides[anchor]))
    assert levels == set(STRIDES)


@pytest.mark.parametrize(("max_det", "top_k"), [(300, 1000), (20, 1000), (3, 1000), (3, 12)])
def test_fainter_boxes_come_after_the_others_and_push_none_out(max_det: int, top_k: int) -> None:
    decoding = Decoding(0.3, 0.6, max_det, top_k)
    pairs = zip(
        decode(raw_maps(3), decoding), decode(raw_maps(3), dataclasses.replace(decoding, conf=0.1)), strict=True
    )
    for shown, all_of_them in pairs:
        count = len(shown.scores)
        assert 3 <= count <= len(all_of_them.scores) <= max_det
        assert (all_of_them.scores[count:] <= 0.3).all()
        for name in ("boxes", "scores", "labels"):
            np.testing.assert_array_equal(getattr(all_of_them, name)[:count], getattr(shown, name))


def test_the_feature_is_pooled_from_boxes_and_maps() -> None:
    maps = raw_maps(2)
    for image, found in enumerate(decode(maps, DECODING)):
        assert found.signals is not None
        flat = np.concatenate([m[image].reshape(CLASSES, -1) for m in maps[:3]], axis=1)
        counts, highest, mean = found.signals.feature.reshape(3, CLASSES)
        np.testing.assert_allclose(np.expm1(counts), np.bincount(found.labels, found.scores, CLASSES), rtol=1e-5)
        np.testing.assert_allclose(highest, flat.max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(mean, flat.mean(axis=1), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_and_arrays_give_the_same(dtype: torch.dtype) -> None:
    tensors = [torch.from_numpy(m).to(dtype) for m in raw_maps(2)]
    arrays = [tensor.float().numpy() for tensor in tensors]
    anchors = np.array([[0, 95, 96, 119, 125], [3, -1, -1, -1, -1]])
    boxes = np.array([[0, 0, 20, 10]] * 5, np.float32)
    found = [Found(boxes, np.full(5, 0.5, np.float32), np.arange(5) % CLASSES)]
    found.append(Found(boxes[:1], np.full(1, 0.5, np.float32), np.array([1])))
    for a, b in zip(with_signals(found, anchors, arrays), with_signals(found, anchors, tensors), strict=True):
        for name in ("margins", "entropies", "rivals", "spreads", "feature"):
            got, expected = getattr(b.signals, name), getattr(a.signals, name)
            np.testing.assert_allclose(got, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_images_without_boxes_have_a_feature() -> None:
    maps = raw_maps(2)
    (nothing, _) = decode(maps, dataclasses.replace(DECODING, conf=1.0))
    assert nothing.signals is not None
    assert (len(nothing.signals), nothing.signals.feature.shape) == (0, (3 * CLASSES,))
    hidden = decode([m.copy() for m in maps], dataclasses.replace(DECODING, hidden=(1,)))[0]
    assert hidden.signals is not None
    assert np.isfinite(hidden.signals.feature).all()
    assert np.isfinite(hidden.signals.entropies).all()


def test_looks() -> None:
    canvas = np.zeros((3, 64, 64), np.uint8)
    canvas[0] = 255
    np.testing.assert_allclose(looks(canvas), [1, 0, 0, 0, 0, 0, 0, 0])
    canvas[:, 32:] = 255
    assert looks(canvas)[6] > looks(canvas)[7] == 0  # the lower half is lit


@pytest.fixture(scope="module")
def predictions(
    lively: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[list[Detections], list[Detections]]]:
    """By runtime: detections without and with signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        results = {}
        for runtime in ("torch", "onnxruntime", "openvino"):
            detector = Detector(lively, "cpu", runtime)
            results[runtime] = detector.predict_batch(PICTURES), detector.predict_batch(PICTURES, signals=True)
        return results


def test_signals_change_no_detection(predictions: dict[str, tuple[list[Detections], list[Detections]]]) -> None:
    for plain, signalled in predictions.values():
        assert sum(len(d) for d in plain) > 5
        for a, b in zip(plain, signalled, strict=True):
            assert a.signals is None
            assert b.signals is not None
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(b.signals.scores, b.scores)
            np.testing.assert_array_equal(b.signals.labels, b.labels)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_every_runtime_gives_the_same(
    predictions: dict[str, tuple[list[Detections], list[Detections]]], runtime: str
) -> None:
    for a, b in zip(predictions["torch"][1], predictions[runtime][1], strict=True):
        assert a.signals is not None
        assert b.signals is not None
        np.testing.assert_allclose(a.signals.feature, b.signals.feature, rtol=1e-2, atol=1e-2)
        if len(a) == len(b) and (a.labels == b.labels).all():
            for name in ("margins", "entropies", "spreads"):
                np.testing.assert_allclose(getattr(a.signals, name), getattr(b.signals, name), atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same(lively: Checkpoint) -> None:
    detectors = [Detector(lively, device, "torch") for device in ("cpu", "cuda")]
    for _ in range(3):  # plain, captured into a graph, replayed
        for a, b in zip(*(detector.predict_batch(PICTURES, signals=True) for detector in detectors), strict=True):
            assert a.signals is not None
            assert b.signals is not None
            np.testing.assert_allclose(a.signals.feature, b.signals.feature, rtol=1e-2, atol=1e-2)


def test_neighbours_by_the_feature_are_neighbours_by_label(shared: Path) -> None:
    """On BCCD: how far the label histogram (log counts) of an image's nearest neighbour is, against any other's."""
    images = read_dataset(shared / "data" / "bccd" / "val.json").images[:60]
    detector = Detector("yolo_nas_n_bccd", "cpu")
    found = detector.predict_batch([read_image(image.path) for image in images], conf=0.05, imgsz=320, signals=True)
    features = np.array([ImageSignals.of(d).feature for d in found])
    histograms = np.log1p([np.bincount(image.labels, minlength=3) for image in images])
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    others = ~np.eye(len(images), dtype=bool)
    apart = np.abs(histograms[:, None] - histograms[None]).sum(axis=2)
    nearest = np.where(others, np.linalg.norm(features[:, None] - features[None], axis=2), np.inf).argmin(axis=1)
    ratio = apart[np.arange(len(images)), nearest].mean() / apart[others].mean()
    print(f"nearest neighbours' label histograms are {ratio:.2f} times as far apart as any two")
    assert ratio < 0.85
