"""modern-yolonas 0.5.0, the nearest peer: installed beside us, built at any of our sizes, trained as its command does.

Nothing of it is copied here: its model, loss, data set, transforms, Lightning module and callbacks are called. Two of
its imports are stood in for. torchvision, which it uses for `ops.batched_nms` alone, by our op with the same contract;
huggingface_hub, which downloads weights that these benchmarks do not use.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import os
import subprocess
import sys
import time
import types
import warnings
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from yolonas import YoloNAS, ops
from yolonas.data.labelled import LabelledImages
from yolonas.evaluation import coco_ap
from yolonas.inference.detections import Detections
from yolonas.model.config import STRIDES, VARIANTS

VERSION = "0.5.0"
FOLDER = Path.home() / ".cache" / "yolonas" / "peers" / f"modern-yolonas-{VERSION}"
# Without dependencies: the others (torch, NumPy, OpenCV, PyYAML, SciPy, pydantic, ...) are here for our own sake.
PACKAGES = (
    f"modern-yolonas=={VERSION}",
    "albumentations==1.4.24",  # as it pins it
    "albucore==0.0.23",
    "simsimd==6.5.16",
    "stringzilla==5.3.2",
    "lightning==2.6.6",
    "lightning-utilities==0.15.3",
    "torchmetrics==1.9.0",
)


def install() -> None:
    """Put the peer into FOLDER, once, and on the path."""
    if not FOLDER.exists():
        unfinished = FOLDER.with_name(f"{FOLDER.name}.{os.getpid()}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(unfinished), *PACKAGES]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"modern-yolonas {VERSION} cannot be installed:\n{result.stderr.strip()[-500:]}")
        if not FOLDER.exists():  # another process may have been quicker
            unfinished.rename(FOLDER)
    if str(FOLDER) in sys.path:
        return
    sys.path.append(str(FOLDER))
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version
    importlib.import_module("lightning")  # first: it looks for torchvision, and the stand-in is no package
    torchvision_ops = _module("torchvision.ops", batched_nms=ops.batched_nms)
    _module("torchvision", ops=torchvision_ops)
    _module("huggingface_hub", hf_hub_download=None)


def _module(name: str, **contents: Any) -> types.ModuleType:
    """A stand-in for a package that is not installed; one that is stays."""
    try:
        return importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        sys.modules[name] = module
        return module


def load(name: str) -> Any:
    """Its module of that name."""
    install()
    return importlib.import_module(f"modern_yolonas.{name}")


def model(variant: str, num_classes: int) -> nn.Module:
    """Its model of our size `variant`, with its own random weights: it has S, M and L; N is built by its functions."""
    name, configs = f"yolo_nas_{variant}", load("configs").CONFIGS
    if name not in configs:
        configs[name] = _configuration(variant)
    network: nn.Module = load("model").YoloNAS.from_config(name, num_classes=num_classes)
    ours = {key: tensor.shape for key, tensor in YoloNAS(variant, num_classes).state_dict().items()}
    if ours != {key: tensor.shape for key, tensor in network.state_dict().items()}:
        raise AssertionError(f"its {name} is not the network that ours is")
    return network


def _configuration(variant: str) -> dict[str, Any]:
    """The numbers of one of our sizes as its configurations have them."""
    size = VARIANTS[variant]
    stages = [
        {
            "out_channels": s.channels,
            "num_blocks": s.blocks,
            "hidden_channels": s.hidden,
            "concat_intermediates": s.concat,
        }
        for s in size.stages
    ]
    neck: dict[str, Any] = {}
    for k, stage in enumerate(size.neck, 1):
        numbers = {"out_channels": stage.channels, "num_blocks": stage.blocks, "hidden_channels": stage.hidden}
        neck[f"neck{k}_config"] = {
            **numbers,
            "width_mult": 1,
            "depth_mult": 1,
            **({"reduce_channels": True} if k < 3 else {}),
        }
    heads = [
        {"inter_channels": channels, "width_mult": 1, "first_conv_group_size": 0, "stride": stride}
        for channels, stride in zip(size.head, STRIDES, strict=True)
    ]
    return {
        "backbone": {
            "stem_out_channels": size.stem,
            "stages": stages,
            "spp_output_channels": size.stages[-1].channels,
            "spp_k": (5, 9, 13),
        },
        "neck": neck,
        "heads": {"reg_max": 16, "heads_list": heads},
    }


def data_set(data: LabelledImages, size: int, file: Path, *, training: bool) -> Any:
    """Its data set of `data`, with the transforms of its training or of its validation; COCO's json goes to `file`."""
    transforms = load("data.transforms")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data.to_coco()))
    steps = [transforms.LetterboxResize(target_size=size)]
    if training:
        steps = [
            transforms.HSVAugment(p=0.5),
            transforms.RandomResizedCrop(size=size, scale=(0.05, 0.8), ratio=(0.75, 1.33), p=1.0),
            transforms.HorizontalFlip(),
            transforms.RandomAffine(degrees=0.0, translate=0.25, scale=(0.5, 1.5)),
            transforms.RandomChannelSwap(p=0.5),
        ]
    chain = transforms.Compose(steps)
    images = load("data.coco").COCODetectionDataset(Path("/"), file, transforms=chain, input_size=size)
    if training:
        steps.append(transforms.Mixup(images, prob=0.5))
    steps.append(transforms.Normalize())
    return images


@dataclass(frozen=True)
class Trained:
    """A run of its training: its averaged weights, the classes it found in the data, and how many images it saw."""

    model: nn.Module
    names: tuple[str, ...]
    images_seen: int


def train(
    train: LabelledImages,
    val: LabelledImages,
    *,
    variant: str,
    size: int,
    batch: int,
    lr: float,
    amp: bool,
    seed: int,
    budget_s: float,
    folder: Path,
    clock: Any = time.process_time,
) -> Trained:
    """Train from random weights as its command `train --format coco --no-pretrained --device cpu --workers 0` would.

    The numbers that its command takes are given, all others are its defaults: transforms, loss, AdamW, warm-up, cosine,
    average of weights, gradient clipping, and the checkpoint with the best AP on `val`, of some four validations (or
    the last weights where they are better, which its command would not look at). Its cosine needs the length of the
    run: a short one, which is not counted, tells how many steps fit into `budget_s` seconds of `clock`. Its validations
    are not counted either.
    """
    install()
    lightning = importlib.import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train_set = data_set(train, size, folder / "train.json", training=True)
    val_set = data_set(val, size, folder / "val.json", training=False)
    names = tuple(train_set.class_names)
    batch = min(batch, len(train_set))  # it leaves out the last batch unless it is full, so a larger one never trains

    def fit(steps: int, seconds: float, validate: bool) -> tuple[Any, _Clock, Any]:
        lightning.seed_everything(seed, verbose=False)
        module = load("training").YoloNASLightningModule(
            model=model(variant, len(names)),
            num_classes=len(names),
            lr=lr,
            warmup_steps=min(1000, max(1, len(train_set) // batch) * 3),
            val_ann_file=folder / "val.json",
            input_size=size,
        )
        data = load("training").DetectionDataModule(train_set, val_set, batch, num_workers=0)
        average, watch = load("training").EMACallback(), _clock_callback(lightning)(clock, seconds)
        callbacks = [average, watch]
        if validate:
            checkpoint = lightning.pytorch.callbacks.ModelCheckpoint
            callbacks.append(checkpoint(dirpath=folder, save_last=True, monitor="val/mAP", mode="max", save_top_k=1))
        trainer = lightning.Trainer(
            max_epochs=-1,
            max_steps=steps,
            accelerator="cpu",
            devices="auto",
            precision="16-mixed" if amp else "32-true",  # on a CPU Lightning makes bf16-mixed of the former
            gradient_clip_val=10.0,
            # Its default is 10, which would take half as long as the training where an epoch is one step.
            check_val_every_n_epoch=max(10, steps // (len(train_set) // batch) // 4),
            limit_val_batches=1.0 if validate else 0,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=validate,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, datamodule=data)
        return trainer, watch, average.ema_model

    _, pilot, _ = fit(10_000, min(6.0, budget_s / 4), validate=False)
    trainer, watch, average = fit(max(1, int(budget_s * pilot.steps / pilot.seconds)), budget_s, validate=True)
    last = Trained(average.eval(), names, watch.steps * batch)
    path = trainer.checkpoint_callback.best_model_path
    if not path:  # the run was too short for a validation
        return last
    best = replace(last, model=copy.deepcopy(average))
    best.model.load_state_dict(
        torch.load(path, map_location="cpu", weights_only=False)["ema_state_dict"]
    )  # our own file
    return max(last, best, key=lambda trained: coco_ap(val, predict(trained, val, size)).ap)


def _clock_callback(lightning: Any) -> type[_Clock]:
    return type("Watch", (_Clock, lightning.Callback), {})


class _Clock:
    """A callback that counts the seconds of training, without validation, and ends it when they are over."""

    def __init__(self, clock: Any, budget_s: float) -> None:
        self.clock, self.budget_s, self.seconds, self.steps = clock, budget_s, 0.0, 0

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.begun = self.clock()

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        self.steps += 1
        self.count()
        if self.seconds >= self.budget_s:
            trainer.should_stop = True

    def count(self) -> None:
        now = self.clock()
        self.seconds, self.begun = self.seconds + now - self.begun, now

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        self.count()

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.begun = self.clock()


@torch.no_grad()
def predict(trained: Trained, data: LabelledImages, size: int) -> list[Detections]:
    """Its detections of each image, with the letterbox, decoding and thresholds of its command `eval`."""
    transforms, postprocess = load("data.transforms"), load("inference.postprocess")
    plain = transforms.Compose([transforms.LetterboxResize(target_size=size), transforms.Normalize()])
    network, found = trained.model, []
    for image in data.images:
        pixels = cv2.imread(str(image.path))
        canvas, _ = plain(pixels, np.zeros((0, 5), dtype=np.float32))
        boxes, scores, labels = postprocess.postprocess(
            *network(torch.from_numpy(canvas)[None]), conf_threshold=0.001, iou_threshold=0.65
        )[0]
        height, width = pixels.shape[:2]
        scale = size / max(height, width)
        pad = ((size - round(width * scale)) // 2, (size - round(height * scale)) // 2)
        corners = (boxes.numpy() - np.tile(pad, 2)) / scale
        corners = np.clip(corners, 0, [width, height, width, height]).astype(np.float32)
        found.append(Detections(corners, scores.numpy(), labels.numpy(), trained.names, (height, width)))
    return found
