"""The example on an exported network: without torch it prints what the reference finds in torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import onnxruntime_numpy
from yolonas import YoloNAS
from yolonas.ops import reference

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture(scope="module")
def network() -> YoloNAS:
    """Random weights, with the statistics of a batch and head weights large enough to see something."""
    torch.manual_seed(0)
    network = YoloNAS("n", num_classes=3)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        network.train()(torch.rand(8, 3, 64, 96))
    for head in network.heads.levels:
        torch.nn.init.normal_(head.cls_pred.weight, std=0.3)
        torch.nn.init.normal_(head.reg_pred.weight, std=0.3)
        torch.nn.init.constant_(head.cls_pred.bias, -2.0)
    return network.fused()


@pytest.fixture(scope="module")
def model(network: YoloNAS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(
        network,
        (torch.rand(2, 3, 64, 96),),
        path,
        input_names=["images"],
        output_names=["class_8", "class_16", "class_32", "box_8", "box_16", "box_32"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    return path


def test_detects_what_the_reference_detects_on_the_same_maps(network: YoloNAS, model: Path) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))  # exported with a batch of 2
    maps = [torch.from_numpy(array) for array in session.run(None, {"images": images.numpy()})]
    with torch.inference_mode():
        for ours, torchs in zip(maps, [m for group in network(images) for m in group], strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3)
    expected = reference.decode_nms(maps[:3], maps[3:], (8, 16, 32), score_threshold=0.25, iou_threshold=0.7)
    assert expected.counts.min() > 3
    for image, (boxes, scores, labels) in enumerate(onnxruntime_numpy.detect(session, images.numpy())):
        n = int(expected.counts[image])
        np.testing.assert_array_equal(labels, expected.labels[image, :n].numpy())
        np.testing.assert_allclose(boxes, expected.boxes[image, :n].numpy(), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(scores, expected.scores[image, :n].numpy(), atol=1e-6)


def test_runs_as_a_script_without_torch(model: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(2).random((2, 3, 64, 96), np.float32)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", WITHOUT_TORCH, onnxruntime_numpy.__file__, model, tmp_path / "images.npy"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    lines = run.stdout.splitlines()
    assert len(lines) == sum(len(boxes) for boxes, _, _ in onnxruntime_numpy.detect(session, images)) > 0
    number, label, score, *box = lines[0].split()
    assert number == "0"
    assert label in "012"
    assert 0.25 < float(score) <= 1
    assert len(box) == 4
