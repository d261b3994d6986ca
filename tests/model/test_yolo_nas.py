"""What holds for YOLO-NAS without any reference at hand."""

from __future__ import annotations

import copy
import hashlib
import math
import pickle

import pytest
import torch

from yolonas.model import VARIANTS, Preprocessing, YoloNAS
from yolonas.model.config import COCO_NAMES

# Keys, parameters used in the training form, fused, as published (with placeholders), convolutions, GMACs, and the
# first of SHA-256 of "key shape" lines of the state_dict: all of super-gradients 3.7.1.
REFERENCE = {
    "s": (921, 12_878_304, 12_167_600, 19_053_888, 100, 15.90, "47c8423deb9eb3ca"),
    "m": (965, 33_861_346, 31_894_002, 51_182_658, 104, 43.88, "9390a76906e585e9"),
    "l": (1097, 44_529_448, 41_984_984, 66_976_392, 116, 59.92, "217edf5d95158323"),
}


def key_digest(model: YoloNAS) -> str:
    lines = [f"{key} {list(value.shape)}" for key, value in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def same_state(one: YoloNAS, two: YoloNAS, without: str = "nothing") -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a if without not in key)


@pytest.fixture(scope="module")
def tiny() -> YoloNAS:
    torch.manual_seed(0)
    model = YoloNAS("n", 3, class_names=["red", "green", "blue"])
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():  # batch norms that do something
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.8, 1.2, generator=generator)
            module.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("variant", REFERENCE)
def test_published_sizes(variant: str) -> None:
    keys, used, fused, published, layers, gmacs, digest = REFERENCE[variant]
    with torch.device("meta"):
        model = YoloNAS(variant)
    info = model.info()
    assert len(model.state_dict()) == keys
    assert (info.parameters, info.parameters_fused, info.parameters_published) == (used, fused, published)
    assert info.layers == layers
    assert round(info.gmacs, 2) == gmacs
    assert info.gflops == 2 * info.gmacs
    assert key_digest(model)[:16] == digest
    for text in (f"{used:,}", f"{published:,}", f"{info.gflops:.2f} GFLOPs", "person", "toothbrush", "RGB"):
        assert text in str(info)


def test_our_own_variant_is_small() -> None:
    info = YoloNAS("n").info()
    assert info.parameters < 1_000_000
    assert info.gmacs < 1.31
    assert info.size_mb == pytest.approx(4 * info.parameters / 1e6, rel=0.02)


def test_operations_follow_the_image_size() -> None:
    model = YoloNAS("n", 1)
    assert model.info(320).gmacs == pytest.approx(model.info(640).gmacs / 4)
    assert model.info((320, 640)).gmacs == pytest.approx(model.info(640).gmacs / 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_batch_norm_constants_and_initial_bias(variant: str) -> None:
    model = YoloNAS(variant, 2) if variant == "n" else None
    if model is None:
        with torch.device("meta"):
            model = YoloNAS(variant, 2)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}
    if variant == "n":
        for head in model.heads.levels:
            assert torch.all(head.cls_pred.bias == torch.tensor(-math.log(99)))


def test_output_shapes() -> None:
    output = YoloNAS("n", 3)(torch.rand(2, 3, 64, 96))
    assert [list(m.shape) for m in output.class_logits] == [[2, 3, 8, 12], [2, 3, 4, 6], [2, 3, 2, 3]]
    assert [list(m.shape) for m in output.box_logits] == [[2, 68, 8, 12], [2, 68, 4, 6], [2, 68, 2, 3]]


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 60, 64), (1, 3, 64, 65)])
def test_an_input_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=str(shape[-1])):
        YoloNAS("n", 1)(torch.rand(shape))


@torch.no_grad()
def test_fusing_does_not_change_the_function(tiny: YoloNAS) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = tiny(images)
    for partial in (True, False):
        fused = tiny.fused(partial=partial)
        assert fused.form == ("partly fused" if partial else "fused")
        assert not fused.training
        assert (fused.class_names, fused.preprocessing) == (tiny.class_names, tiny.preprocessing)
        for found, maps in zip(fused(images), expected, strict=True):
            for a, b in zip(found, maps, strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)
    assert tiny.form == "training"  # fused() made copies
    twice = tiny.fused(partial=True).fused()
    assert same_state(twice, tiny.fused())
    assert not [m for m in twice.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_strict_loading_with_and_without_placeholders(tiny: YoloNAS) -> None:
    state = tiny.state_dict()
    placeholders = [key for key in state if ".rbr_reparam." in key]
    assert placeholders
    for key in placeholders:
        state[key] = torch.randn_like(state[key])  # random in super-gradients; no parameter of ours may receive them
    for given in (state, {k: v for k, v in state.items() if k not in placeholders}):
        other = YoloNAS("n", 3)
        other.load_state_dict(given, strict=True)
        assert same_state(other, tiny)
        assert [n for n, _ in other.named_parameters() if "rbr_reparam" in n] == []
    with pytest.raises(RuntimeError, match=r"heads\.head1\.cls_pred"):
        YoloNAS("n", 4).load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="surprise"):
        YoloNAS("n", 3).load_state_dict(state | {"backbone.stem.conv.surprise": torch.zeros(1)}, strict=True)
    fused = tiny.fused()
    fused.load_state_dict(tiny.fused().state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="rbr_reparam"):
        fused.load_state_dict({k: v for k, v in fused.state_dict().items() if "rbr_reparam" not in k}, strict=True)


def test_copies_and_pickles(tiny: YoloNAS) -> None:
    for other in (copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny))):
        assert list(other.state_dict()) == list(tiny.state_dict())
        other.load_state_dict(tiny.state_dict(), strict=True)


def test_training_step_on_channels_last(tiny: YoloNAS) -> None:
    """torch 2.13.0 corrupts memory in the backward of a 1x1 stride-2 convolution on such an input."""
    model = copy.deepcopy(tiny).to(memory_format=torch.channels_last).train()
    images = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    for _ in range(3):
        output = model(images)
        sum(m.square().mean() for maps in output for m in maps).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert missing == []


def test_strided_branch_is_the_strided_convolution(tiny: YoloNAS) -> None:
    block = tiny.backbone.stem.conv
    x = torch.rand(1, 3, 34, 38)
    expected = torch.nn.functional.conv2d(x, block.branch_1x1.weight, block.branch_1x1.bias, stride=2)
    torch.testing.assert_close(block.branch_1x1(x[:, :, ::2, ::2]), expected)


def rows(model: YoloNAS) -> list[torch.Tensor]:
    return [
        torch.cat([head.cls_pred.weight.flatten(1), head.cls_pred.bias[:, None]], 1).detach()
        for head in model.heads.levels
    ]


def test_with_classes_keeps_the_rows_it_knows(tiny: YoloNAS) -> None:
    generator = torch.Generator().manual_seed(3)
    other = tiny.with_classes(["Blue", "yellow", "red", "crimson"], sources={"crimson": "red"}, generator=generator)
    assert other.class_names == ("Blue", "yellow", "red", "crimson")
    assert other.num_classes == 4
    assert tiny.class_names == ("red", "green", "blue")
    for old, new in zip(rows(tiny), rows(other), strict=True):
        assert torch.equal(new[[0, 2, 3]], old[[2, 0, 0]])
        assert not any(torch.equal(new[1], row) for row in old)
    assert same_state(tiny, other, without="cls_pred")
    assert other(torch.rand(1, 3, 32, 32)).class_logits[0].shape[1] == 4
    assert all(p.requires_grad for p in other.parameters())


def test_new_rows_are_drawn_like_the_old_ones() -> None:
    model = YoloNAS("n", 80)
    with torch.no_grad():
        for head in model.heads.levels:
            head.cls_pred.bias.normal_(-4.0, 0.5)
    drawn = model.with_classes([f"new {i}" for i in range(2000)], generator=torch.Generator().manual_seed(0))
    again = model.with_classes([f"new {i}" for i in range(2000)], generator=torch.Generator().manual_seed(0))
    for old, new, same in zip(model.heads.levels, drawn.heads.levels, again.heads.levels, strict=True):
        for key in ("weight", "bias"):
            a, b = getattr(old.cls_pred, key), getattr(new.cls_pred, key)
            assert abs(a.mean() - b.mean()) < 0.06
            assert b.std().item() == pytest.approx(a.std().item(), rel=0.1)
            assert torch.equal(b, getattr(same.cls_pred, key))


def test_same_classes_leave_the_head_untouched(tiny: YoloNAS) -> None:
    same = tiny.with_classes(tiny.class_names)
    assert same_state(same, tiny)


def test_with_classes_from_one_class_draws_finite_rows() -> None:
    model = YoloNAS("n", 1).with_classes(["a", "b"])
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'x' is not one of n, s, m, l"):
        YoloNAS("x")
    with pytest.raises(ValueError, match="num_classes 0"):
        YoloNAS("n", 0)
    with pytest.raises(ValueError, match="2 class names were given for 3 classes"):
        YoloNAS("n", 3, class_names=["a", "b"])
    with pytest.raises(ValueError, match=r"look at \['a'\]"):
        YoloNAS("n", 3, class_names=["a", "b", "a"])
    with pytest.raises(ValueError, match="not the string 'abc'"):
        YoloNAS("n", 3, class_names="abc")
    model = YoloNAS("n", 2)
    with pytest.raises(ValueError, match="0 class names"):
        model.with_classes([])
    with pytest.raises(ValueError, match="cannot start from 'dog'"):
        model.with_classes(["cat"], sources={"cat": "dog"})


def test_default_names() -> None:
    assert YoloNAS("n").class_names == COCO_NAMES
    assert len(set(COCO_NAMES)) == 80
    assert YoloNAS("n", 2).class_names == ("class_0", "class_1")


def test_preprocessing_survives_its_dictionary() -> None:
    p = Preprocessing((320, 640), 600, "int", "bottom_right", 0, "bgr", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert Preprocessing.from_dict(p.to_dict()) == p
    assert Preprocessing.from_dict({}) == Preprocessing()
    assert Preprocessing.square(320) == Preprocessing(image_size=(320, 320), resize_to=320)
    with pytest.raises(ValueError, match="colour"):
        Preprocessing.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "values",
    [
        {"image_size": (640, 650)},
        {"image_size": (0, 640)},
        {"resize_to": 641},
        {"resize_to": 0},
        {"pad_value": 256},
        {"pad": "left"},
        {"channels": "gbr"},
        {"rounding": "floor"},
        {"mean": (1.0,)},
        {"std": (1.0, 0.0, 1.0)},
        {"std": (1.0, math.nan, 1.0)},
    ],
)
def test_impossible_preprocessing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Preprocessing(**values)


def test_the_scale_fits_the_canvas() -> None:
    assert Preprocessing().scale(480, 640) == 636 / 640
    assert Preprocessing((320, 640), resize_to=640).scale(640, 640) == 0.5
