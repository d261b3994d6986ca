"""The generator of sample images: exact boxes, one picture per seed and number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from yolonas.data import samples
from yolonas.data.readers import read_dataset


def test_boxes_bound_what_a_painter_leaves_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[tuple[np.ndarray, int, int]] = []
    monkeypatch.setattr(samples, "_composite", lambda _p, _c, alpha, top, left, _l: painted.append((alpha, top, left)))
    overlaps = 0
    for seed in range(4):
        painted.clear()
        _, boxes, labels = samples.draw(np.random.default_rng(seed), 240, 320)
        owner = np.zeros((240 + 400, 320 + 400), dtype=int)
        for number, (alpha, top, left) in enumerate(painted, start=1):
            view = owner[top + 200 : top + 200 + alpha.shape[0], left + 200 : left + 200 + alpha.shape[1]]
            overlaps += bool(view[alpha >= 0.5].any())
            view[alpha >= 0.5] = number
        owner = owner[200:-200, 200:-200]
        assert 5 <= len(boxes) == len(labels) == len(painted) <= 12
        for number, box in enumerate(boxes, start=1):
            rows, columns = np.nonzero(owner == number)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert overlaps > 0


def test_files_agree_with_what_is_returned(tmp_path: Path) -> None:
    made = samples.generate(tmp_path, 3, seed=5, image_size=(192, 256))
    read = read_dataset(tmp_path / "instances.json")
    assert read.names == made.names == ("washer", "bolt", "nut")
    assert not read.dropped
    for ours, theirs in zip(made.images, read.images, strict=True):
        assert ours.path.resolve() == theirs.path.resolve()
        assert (ours.height, ours.width) == (theirs.height, theirs.width) == (192, 256)
        assert np.array_equal(ours.boxes, theirs.boxes)
        assert np.array_equal(ours.labels, theirs.labels)
        assert (ours.boxes[:, 2:] > ours.boxes[:, :2]).all()
        assert (ours.boxes >= 0).all()
        assert (ours.boxes <= (256, 192, 256, 192)).all()


def test_a_picture_depends_on_seed_and_number_only(tmp_path: Path) -> None:
    few = samples.generate(tmp_path / "few", 2, seed=1, image_size=(128, 160))
    many = samples.generate(tmp_path / "many", 3, seed=1, image_size=(128, 160))
    other = samples.generate(tmp_path / "other", 2, seed=2, image_size=(128, 160))
    for k in range(2):
        assert few.images[k].path.read_bytes() == many.images[k].path.read_bytes()
        assert few.images[k].path.read_bytes() != other.images[k].path.read_bytes()
    entries = json.loads((tmp_path / "few" / "instances.json").read_text())["images"]
    assert [entry["file_name"] for entry in entries] == ["parts_0000.jpg", "parts_0001.jpg"]


def test_too_small_a_picture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="64 x 640"):
        samples.generate(tmp_path, 1, image_size=(64, 640))
