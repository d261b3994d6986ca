"""A network and images whose true boxes are what the network itself finds: its AP is known without training."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from yolonas.checkpoint import Checkpoint
from yolonas.data.labelled import LabelledImages
from yolonas.data.readers import read_dataset
from yolonas.inference.detector import Detector
from yolonas.model import Preprocessing, YoloNAS

NAMES = ("cat", "dog", "bird")
SPOILT = "backbone.stage1.downsample.rbr_reparam"


def trainable() -> YoloNAS:
    """An N for 64 px whose scores and boxes differ from point to point."""
    torch.manual_seed(0)
    model = YoloNAS("n", 3, class_names=NAMES, preprocessing=Preprocessing.square(64))
    for parameter in model.parameters():  # untrained scores all lie at 0.01; these spread over 0..1
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter, a=0.75)
    for level in model.heads.levels:
        torch.nn.init.zeros_(level.cls_pred.bias)
        level.reg_pred.bias.data = -torch.arange(17.0).repeat(4)  # small boxes, which the image does not clip
    return model.eval()


def network() -> YoloNAS:
    """`trainable`, fused."""
    return trainable().fused().requires_grad_(False)


def spoil(model: YoloNAS) -> None:
    """Give SPOILT weights that int8 cannot hold, while the network stays the same function in float.

    One of its input channels gets a thousandth of its values and a thousand times its weights: beside those all other
    weights round to 0.
    """
    before, after = model.backbone.stem.conv.rbr_reparam, model.backbone.stage1.downsample.rbr_reparam
    channel = int(before.bias.argmax())
    with torch.no_grad():
        before.weight[channel] *= 1e-3
        before.bias[channel] *= 1e-3
        after.weight[:, channel] *= 1e3


def draw(folder: Path, model: YoloNAS, counts: dict[str, int]) -> Path:
    """Images with what the model finds in them as COCO json files, one for each part; returns the folder."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    detector = Detector(Checkpoint(model), device="cpu", runtime="torch")
    for part, count in counts.items():
        images, annotations = [], []
        for k in range(count):
            name = f"{part}{k}.png"
            pixels = cv2.resize(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), (64, 64))
            cv2.imwrite(str(folder / "images" / name), pixels)
            images.append({"id": k + 1, "file_name": name, "width": 64, "height": 64})
            found = detector(folder / "images" / name, conf=0.3, max_det=20)
            for box, label in zip(found.boxes.tolist(), found.labels.tolist(), strict=True):
                x1, y1, x2, y2 = box
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": k + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(document))
    return folder


def part(folder: Path, name: str) -> LabelledImages:
    return read_dataset(folder, name)
