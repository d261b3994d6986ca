"""Loading each kind of checkpoint, and saving our own."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from yolonas import checkpoint
from yolonas.checkpoint import DECI_LICENSE, Checkpoint
from yolonas.errors import CheckpointError
from yolonas.model import Preprocessing, YoloNAS
from yolonas.model.blocks import QARepVGG
from yolonas.model.config import COCO_NAMES

NAMES = ["platelets", "red cells", "white cells"]
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture(scope="module")
def model() -> YoloNAS:
    torch.manual_seed(0)
    return YoloNAS("n", 3).eval()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def write(value: Any, path: Path, zipped: bool = True) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


def same_weights(one: YoloNAS, two: YoloNAS) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def state_of(model: YoloNAS, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """A state_dict as super-gradients saves it: placeholders are random."""
    return OrderedDict(
        (
            key,
            torch.randn_like(value)
            if ".rbr_reparam." in key
            else value + shift
            if value.is_floating_point()
            else value,
        )
        for key, value in model.state_dict().items()
    )


# --- super-gradients --------------------------------------------------------------------------------------------------


@FORMATS
def test_a_training_checkpoint_of_super_gradients(model: YoloNAS, path: Path, zipped: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    tree = {
        "net": state_of(model, shift=1.0),
        "acc": torch.tensor(0.5),
        "epoch": 7,
        "metrics": {"mAP@0.50": np.float64(0.4)},
        "packages": {"torch": "2.1"},
        "optimizer_state_dict": optimizer.state_dict(),
        "scaler_state_dict": {},
        "ema_net": state_of(model),
        "processing_params": {
            "class_names": [np.str_(name) for name in NAMES],
            "image_processor": {
                "ComposeProcessing": {
                    "processings": [
                        {"ReverseImageChannels": {}},
                        {"DetectionLongestMaxSizeRescale": {"output_shape": (512, 512)}},
                        {"DetectionBottomRightPadding": {"output_shape": [512, 512], "pad_value": 128}},
                        {"StandardizeImage": {"max_value": np.float64(255.0)}},
                        {"ImagePermute": {"permutation": (2, 0, 1)}},
                    ]
                }
            },
            "iou": np.float32(0.65),
            "conf": 0.5,
        },
    }
    loaded = checkpoint.load(write(tree, path, zipped))
    assert same_weights(loaded.model, model)  # the averaged weights, not those of `net`
    assert not loaded.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.model.class_names == tuple(NAMES)
    assert all(type(name) is str for name in loaded.model.class_names)
    assert loaded.model.preprocessing == Preprocessing(
        (512, 512), 512, pad="bottom_right", pad_value=128, channels="bgr"
    )
    assert (loaded.conf, loaded.iou) == (0.5, pytest.approx(0.65))
    torch.nn.Sequential(loaded.model)(torch.rand(1, 3, 32, 32))[0][0].sum().backward()


@FORMATS
@pytest.mark.parametrize("prefix", ["", "module.", "model.module.", "_orig_mod."])
@pytest.mark.parametrize("key", [None, "net", "state_dict"])
def test_prefixes_and_places_of_the_weights(
    model: YoloNAS, path: Path, zipped: bool, prefix: str, key: str | None
) -> None:
    state = {prefix + name: value for name, value in state_of(model).items()} | {"steps": torch.zeros(1)}
    if not prefix:
        state.pop("steps")
    loaded = checkpoint.load(write(state if key is None else {key: state, "epoch": 1}, path, zipped))
    assert same_weights(loaded.model, model)
    assert loaded.model.class_names == ("class_0", "class_1", "class_2")
    assert loaded.model.preprocessing == Preprocessing()
    assert (loaded.conf, loaded.iou) == (0.25, 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(model: YoloNAS, path: Path, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state_of(model).items()}
    loaded = checkpoint.load(write(state, path)).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.backbone.stem.conv.post_bn.weight, model.backbone.stem.conv.post_bn.weight)


def test_eighty_classes_without_names_are_coco_s_and_bound_by_deci_s_licence(path: Path) -> None:
    loaded = checkpoint.load(write({"ema_net": state_of(YoloNAS("s"))}, path))
    assert loaded.model.class_names == COCO_NAMES
    assert loaded.model.variant == "s"
    assert loaded.license == DECI_LICENSE


def test_views_of_one_storage(model: YoloNAS, path: Path) -> None:
    state = state_of(model)
    size = sum(v.numel() for v in state.values())
    flat, start = torch.zeros(size), 0
    for key, value in state.items():
        if value.is_floating_point():
            flat[start : start + value.numel()] = value.flatten()
            view = flat[start : start + value.numel()].view(value.shape)
            start += value.numel()
            if value.ndim == 4:  # and a layout that is not contiguous
                view = value.to(memory_format=torch.channels_last)
            state[key] = view
    assert same_weights(checkpoint.load(write(state, path)).model, model)


# --- whole modules ----------------------------------------------------------------------------------------------------


def fake_class(name: str, base: type = object) -> type:
    """A class in a module `super_gradients...` that exists only while the fixture below does."""
    module, _, attribute = f"super_gradients.{name}".rpartition(".")
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:length]), types.ModuleType(".".join(parts[:length])))
    cls = type(attribute, (base,), {"__module__": module})
    setattr(sys.modules[module], attribute, cls)
    return cls


@pytest.fixture
def super_gradients() -> Iterator[types.SimpleNamespace]:
    before = set(sys.modules)
    processing = "training.processing.processing."
    yield types.SimpleNamespace(
        Net=fake_class("training.models.detection_models.yolo_nas.yolo_nas_variants.YoloNAS_S", nn.Module),
        Block=fake_class("modules.qarepvgg_block.QARepVGGBlock", nn.Module),
        Other=fake_class("modules.conv_bn_act_block.Conv", nn.Module),
        Params=fake_class("training.utils.utils.HpmStruct"),
        processing={
            name: fake_class(processing + name)
            for name in (
                "ComposeProcessing",
                "DetectionLongestMaxSizeRescale",
                "DetectionCenterPadding",
                "NormalizeImage",
                "StandardizeImage",
                "ImagePermute",
            )
        },
    )
    for name in set(sys.modules) - before:
        if name.startswith("super_gradients"):
            del sys.modules[name]


def as_super_gradients(module: nn.Module, fakes: types.SimpleNamespace, root: bool = True) -> nn.Module:
    """The same tree with classes of super_gradients in the place of ours."""
    if type(module).__module__.startswith("torch."):
        return module
    copy = (fakes.Net if root else fakes.Block if isinstance(module, QARepVGG) else fakes.Other)()
    for name, parameter in module.named_parameters(recurse=False):
        copy.register_parameter(name, parameter)
    for name, child in module.named_children():
        is_ours = not type(child).__module__.startswith("torch.") or isinstance(child, nn.Sequential | nn.ModuleList)
        if isinstance(child, nn.ModuleList):
            child = nn.ModuleList(as_super_gradients(c, fakes, root=False) for c in child)
        elif isinstance(child, nn.Sequential) and is_ours:
            child = nn.Sequential(
                OrderedDict((n, as_super_gradients(c, fakes, root=False)) for n, c in child.named_children())
            )
        else:
            child = as_super_gradients(child, fakes, root=False)
        copy.add_module(name, child)
    if isinstance(module, QARepVGG):
        out_channels, in_channels = module.branch_3x3.conv.weight.shape[:2]
        copy.rbr_reparam = nn.Conv2d(in_channels, out_channels, 3)
        copy.register_buffer("id_tensor", torch.zeros(3, 3), persistent=False)
        copy.nonlinearity = nn.ReLU(inplace=True)
    return copy


@FORMATS
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "in a dictionary"])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pickled_module_without_its_classes(
    model: YoloNAS, path: Path, zipped: bool, wrapped: bool, super_gradients: types.SimpleNamespace
) -> None:
    net = as_super_gradients(model, super_gradients)
    assert [key for key in net.state_dict() if "id_tensor" not in key] == list(model.state_dict())
    steps = []
    for name, attributes in (
        ("DetectionLongestMaxSizeRescale", {"output_shape": (636, 636)}),
        ("DetectionCenterPadding", {"output_shape": (640, 640), "pad_value": 114}),
        ("StandardizeImage", {"max_value": 255.0}),
        ("NormalizeImage", {"mean": np.full((1, 1, 3), 0.5, np.float32), "std": np.array([[[0.1, 0.2, 0.4]]])}),
        ("ImagePermute", {"permutation": (2, 0, 1)}),
    ):
        step = super_gradients.processing[name]()
        vars(step).update(attributes)
        steps.append(step)
    net._image_processor = super_gradients.processing["ComposeProcessing"]()
    net._image_processor.processings = steps
    net._class_names = list(NAMES)
    net._default_nms_conf, net._default_nms_iou = 0.3, 0.6
    net.arch_params = super_gradients.Params()
    net.arch_params.loop = net.arch_params
    write({"model": net, "epoch": -1, "ema": None} if wrapped else net, path, zipped)
    for name in [name for name in sys.modules if name.startswith("super_gradients")]:
        del sys.modules[name]

    loaded = checkpoint.load(path)
    assert same_weights(loaded.model, model)
    assert loaded.model.class_names == tuple(NAMES)
    assert (loaded.conf, loaded.iou) == (0.3, 0.6)
    p = loaded.model.preprocessing
    assert p == Preprocessing(mean=p.mean, std=p.std)
    assert p.mean == pytest.approx((0.5, 0.5, 0.5))
    assert p.std == pytest.approx((0.1, 0.2, 0.4))
    assert "super_gradients" not in sys.modules


# --- processing parameters --------------------------------------------------------------------------------------------

RESIZE = {"DetectionLongestMaxSizeRescale": {"output_shape": (636, 636)}}
PAD = {"DetectionCenterPadding": {"output_shape": (640, 640), "pad_value": 114}}
SCALE = {"StandardizeImage": {"max_value": 255}}


def processed(model: YoloNAS, path: Path, *steps: Any, **kwargs: Any) -> Preprocessing:
    tree = {"net": state_of(model), "processing_params": {"image_processor": list(steps)}}
    return checkpoint.load(write(tree, path), **kwargs).model.preprocessing


def test_the_coco_processing_is_the_default_one(model: YoloNAS, path: Path) -> None:
    assert processed(model, path, RESIZE, PAD, SCALE, {"ImagePermute": {}}) == Preprocessing()


def test_two_reversals_of_channels_cancel(model: YoloNAS, path: Path) -> None:
    reverse = {"ReverseImageChannels": None}
    assert processed(model, path, reverse, reverse, RESIZE, PAD, SCALE).channels == "rgb"
    assert processed(model, path, RESIZE, PAD, reverse, SCALE).channels == "bgr"


def test_scaling_is_expressed_in_units_of_the_unit_image(model: YoloNAS, path: Path) -> None:
    """x = image / 255 enters the network as (x - mean) / std, whatever the order and the divisor in the file."""
    pixel = np.array([10.0, 100.0, 250.0])
    normalize = {"NormalizeImage": {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}}
    reverse = {"ReverseImageChannels": {}}
    for steps, expected in (
        ([], pixel),
        ([{"StandardizeImage": {"max_value": 128}}], pixel / 128),
        ([normalize], (pixel - [1, 2, 3]) / [4, 5, 6]),
        ([SCALE, normalize], (pixel / 255 - [1, 2, 3]) / [4, 5, 6]),
        ([normalize, SCALE], (pixel - [1, 2, 3]) / [4, 5, 6] / 255),
        ([normalize, reverse], ((pixel - [1, 2, 3]) / [4, 5, 6])[::-1]),
    ):
        p = processed(model, path, RESIZE, PAD, *steps)
        x = (pixel if p.channels == "rgb" else pixel[::-1]) / 255
        found = (x - (p.mean or 0)) / (p.std or 1)
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=str(steps))


def test_a_rectangular_canvas(model: YoloNAS, path: Path) -> None:
    shape = {"output_shape": (384, 640)}
    p = processed(model, path, {"DetectionLongestMaxSizeRescale": shape}, {"DetectionCenterPadding": shape}, SCALE)
    assert p.image_size == (384, 640)
    for height, width in ((100, 900), (900, 100), (384, 640)):
        assert p.scale(height, width) == min(384 / height, 640 / width)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([{"DetectionRescale": {"output_shape": (640, 640)}}, PAD], "step DetectionRescale"),
        ([PAD], "both resize and pad"),
        ([RESIZE], "both resize and pad"),
        ([RESIZE, {"DetectionCenterPadding": {"output_shape": (650, 650)}}], "multiples of 32"),
        ([{"DetectionLongestMaxSizeRescale": {"output_shape": (380, 636)}}, PAD], "not supported"),
        ([RESIZE, {"DetectionCenterPadding": {"output_shape": (640, 640), "pad_value": (1, 2, 3)}}], "only grey"),
        ([7], "holds a int"),
        ([RESIZE, PAD, {"NormalizeImage": {}}], "mean"),
        ([[]] * 200, "more than 100"),
    ],
)
def test_processing_that_cannot_be_honoured_is_named(model: YoloNAS, path: Path, steps: list[Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=rf"weights\.pth cannot be used as it is .*{reason}.*preprocessing="):
        processed(model, path, *steps)
    assert processed(model, path, *steps, preprocessing=Preprocessing.square(320)) == Preprocessing.square(320)


# --- our own format, and safetensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["training", "partly fused", "fused"])
def test_our_own_format_keeps_everything(model: YoloNAS, tmp_path: Path, form: str) -> None:
    source = model.with_classes(["a", "b"])
    source.preprocessing = Preprocessing.square(320)
    source = source if form == "training" else source.fused(partial=form != "fused")
    record = {"epochs": 3, "history": [{"ap": 0.1}], "start": None, "text": "ä"}
    path = tmp_path / "best.safetensors"
    checkpoint.save(Checkpoint(source, conf=0.4, iou=0.6, license="mine", record=record), path)
    loaded = checkpoint.load(path)
    assert loaded.model.form == form
    assert same_weights(loaded.model, source)
    assert loaded.model.class_names == ("a", "b")
    assert loaded.model.preprocessing == Preprocessing.square(320)
    assert (loaded.conf, loaded.iou, loaded.license, loaded.record) == (0.4, 0.6, "mine", record)
    metadata = checkpoint.read_metadata(path)
    assert metadata["variant"] == "n"
    assert metadata["form"] == form
    assert metadata["record"] == record
    assert os.listdir(tmp_path) == ["best.safetensors"]


def test_the_file_is_small_and_has_super_gradients_keys(model: YoloNAS, path: Path) -> None:
    checkpoint.save(Checkpoint(model), path)
    state = safetensors.torch.load_file(path)
    assert set(state) == {key for key in model.state_dict() if ".rbr_reparam." not in key}
    YoloNAS("n", 3).load_state_dict(state, strict=True)
    assert path.stat().st_size < 1.02 * model.info().size_mb * 1e6 + 100_000


@pytest.mark.parametrize("placeholders", [True, False])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_safetensors_of_others(model: YoloNAS, path: Path, placeholders: bool, prefix: str) -> None:
    state = {prefix + k: v for k, v in state_of(model).items() if placeholders or ".rbr_reparam." not in k}
    safetensors.torch.save_file(state, path)
    loaded = checkpoint.load(path, class_names=NAMES)
    assert same_weights(loaded.model, model)
    assert loaded.model.class_names == tuple(NAMES)
    with pytest.raises(CheckpointError, match="not written by yolonas"):
        checkpoint.read_metadata(path)


def test_loading_does_not_keep_the_file(model: YoloNAS, path: Path) -> None:
    checkpoint.save(Checkpoint(model), path)
    loaded = checkpoint.load(path)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert same_weights(loaded.model, model)


def test_saving_replaces_at_once_or_not_at_all(model: YoloNAS, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(Checkpoint(model, conf=0.1), path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(Checkpoint(model, record={"x": object()}), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(Checkpoint(model, conf=0.2), path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    checkpoint.save(Checkpoint(model, conf=0.3), path)
    assert checkpoint.load(path).conf == 0.3
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_readers_never_see_half_a_file(model: YoloNAS, path: Path) -> None:
    checkpoint.save(Checkpoint(model), path)
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.wait(0.001):  # a busy loop would leave the writer no turn
            try:
                checkpoint.read_metadata(path)
            except Exception as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(10):
        checkpoint.save(Checkpoint(model, record={"i": i}), path)
    stop.set()
    reader.join()
    assert failures == []


@pytest.mark.parametrize("name", ["conf", "iou"])
def test_thresholds_outside_the_unit_interval_are_refused(model: YoloNAS, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Checkpoint(model, **{name: 1.5})
    with pytest.raises(ValueError, match=name):
        Checkpoint(model, **{name: float("nan")})


def test_a_newer_format_asks_for_an_upgrade(model: YoloNAS, path: Path) -> None:
    checkpoint.save(Checkpoint(model), path)
    state = safetensors.torch.load_file(path)
    metadata = checkpoint.read_metadata(path) | {"format": 2}
    safetensors.torch.save_file(state, path, {"yolonas": json.dumps(metadata)})
    for function in (checkpoint.load, checkpoint.read_metadata):
        with pytest.raises(CheckpointError, match="format 2 by a newer yolonas: upgrade"):
            function(path)


# --- files that do not fit --------------------------------------------------------------------------------------------


def test_what_was_asked_for_is_checked(model: YoloNAS, path: Path) -> None:
    write(state_of(model), path)
    assert checkpoint.load(path, num_classes=3, variant="n").model.num_classes == 3
    with pytest.raises(CheckpointError, match=r"weights\.pth has 3 classes, not 80: load it without num_classes"):
        checkpoint.load(path, num_classes=80)
    with pytest.raises(CheckpointError, match=r"weights\.pth is a YOLO-NAS-N, not the 's' asked for"):
        checkpoint.load(path, variant="s")
    with pytest.raises(CheckpointError, match=r"2 class names were given for 3 classes.*class_names="):
        checkpoint.load(path, class_names=["a", "b"])


def test_names_in_the_file_that_do_not_fit(model: YoloNAS, path: Path) -> None:
    write({"net": state_of(model), "processing_params": {"class_names": list(COCO_NAMES)}}, path)
    with pytest.raises(CheckpointError, match="80 class names were given for 3 classes"):
        checkpoint.load(path)
    assert checkpoint.load(path, class_names=NAMES).model.class_names == tuple(NAMES)


def change(state: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    return state


STEM = "backbone__stem__conv__branch_3x3__conv__weight"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"heads__head2__reg_pred__bias": None}, r"heads\.head2\.reg_pred\.bias is missing"),
        ({"heads__head9__weight": torch.zeros(1)}, r"heads\.head9\.weight is not part of it"),
        ({"heads__head2__reg_pred__bias": torch.zeros(64)}, r"reg_pred\.bias is \[64\], not \[68\]"),
        ({"heads__head2__cls_pred__bias": torch.zeros(4)}, r"cls_pred\.bias is \[4\], not \[3\]"),
        ({STEM: torch.zeros(20, 3, 3, 3)}, "none of n, s, m, l"),
        ({"heads__head1__cls_pred__weight": None}, "holds no YOLO-NAS detector"),
        ({"heads__head1__reg_pred__bias": torch.full((68,), float("nan"))}, "not finite"),
        ({"heads__head1__reg_pred__bias": torch.zeros(68, dtype=torch.int8)}, "int8.*quantized"),
    ],
)
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_weights_that_are_not_yolo_nas(
    model: YoloNAS, path: Path, changes: dict[str, Any], reason: str, kind: str
) -> None:
    state = change(state_of(model), **changes)
    write(state, path) if kind == "pth" else safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=rf"weights\.pth .*{reason}") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


def test_half_fused_files_are_named(model: YoloNAS, path: Path) -> None:
    state = model.state_dict() | model.fused().state_dict()
    with pytest.raises(CheckpointError, match=r"not part of it \(and \d+ more\)"):
        checkpoint.load(write(state, path))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"hello world, this is not a checkpoint", "neither safetensors nor written by torch"),
        (bytes(1000), "neither"),
        (b"PK\x03\x04" + bytes(100), "zip"),
        (b"\x80\x02K\x05.", "not one written by torch"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{" + bytes(3), "."),
    ],
)
def test_files_that_are_something_else(path: Path, content: bytes, reason: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.pth is damaged or not a checkpoint .*{reason}.*download"):
        checkpoint.load(path)


def test_missing_files_and_folders(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_metadata(path)


def test_checkpoints_of_other_models(path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights of YOLO-NAS"):
        checkpoint.load(write({"state_dict": nn.Linear(2, 2).state_dict()}, path))


def test_half_stores_float16_and_loads_as_float32(tmp_path: Path) -> None:
    model = YoloNAS("n", 2)
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    checkpoint.save(Checkpoint(model), whole)
    checkpoint.save(Checkpoint(model), half, half=True)
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    for key, value in checkpoint.load(half).model.state_dict().items():
        assert value.dtype == model.state_dict()[key].dtype
        if "rbr_reparam" not in key:
            torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-6)
    model.heads.head1.cls_pred.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match="cannot be stored in float16"):
        checkpoint.save(Checkpoint(model), half, half=True)
