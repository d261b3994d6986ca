"""The page for people who come from another library, python/README.md: every line of it that is ours runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from yolonas import checkpoint
from yolonas.cli import main
from yolonas.data import samples
from yolonas.export import export_raw_onnx
from yolonas.inference.sources import read_image, write_image
from yolonas.weights import resolve

PAGE = Path(__file__).resolve().parents[1] / "python" / "README.md"
CLASSES = ("RBC", "WBC", "Platelets")  # of the checkpoint that comes along


def lines_of_ours(page: str) -> Iterator[str]:
    """In the page's order: the code of every table's last column that is headed `yolonas`, and Python blocks."""
    ours, block = False, None
    for line in page.splitlines():
        if block is not None:
            if line == "```":
                yield "\n".join(block)
                block = None
            else:
                block.append(line)
        elif line == "```python":
            block = []
        elif line.startswith("|"):
            last = line.strip("|").split(" | ")[-1].strip()
            if last == "yolonas":
                ours = True
            elif ours:
                yield from re.findall(r"`([^`]+)`", last)
        else:
            ours = False


def test_the_lines_are_found() -> None:
    page = "| a | yolonas |\n|---|---|\n| `x` | `y`, `z` |\n\n| a | here |\n| `p` | `q` |\n\n```python\nb = 1\nc\n```\n"
    assert list(lines_of_ours(page)) == ["y", "z", "b = 1\nc"]
    found = list(lines_of_ours(PAGE.read_text(encoding="utf-8")))
    commands = {line.split()[1] for line in found if line.startswith("yolonas ")}
    assert commands >= {"predict", "val", "train", "export", "quantize", "benchmark", "info"}
    assert {"d.boxes", "d.scores", "d.labels", "d.to_supervision()"} <= set(found)


@pytest.fixture
def _pictures(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page's lines name: weights, photographs, and a data set with a part to train on and one to measure."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "coming-from-cache"))
    loaded = checkpoint.load(resolve("yolo_nas_n_bccd"))
    loaded.model.preprocessing = loaded.model.preprocessing.on_canvas(64)
    checkpoint.save(loaded, "best.safetensors")
    export_raw_onnx(loaded, Path("exported.onnx"))
    for part, count in (("train", 8), ("val", 4)):
        data = samples.generate(Path("smears") / part, count, seed=count, image_size=(128, 160))
        document = json.loads(Path("smears", part, "instances.json").read_text())
        for category, name in zip(document["categories"], CLASSES, strict=True):
            category["name"] = name
        Path("smears", part, "instances.json").unlink()
        Path("smears", part, "_annotations.coco.json").write_text(json.dumps(document))
        for number, image in enumerate(data.images[:2]):
            for name in ("a.jpg", "b.jpg", "street.jpg", f"photographs/{part}{number}.jpg"):
                Path(name).parent.mkdir(exist_ok=True)
                write_image(name, read_image(image.path))

    frame = read_image(Path("street.jpg"))
    writer = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (frame.shape[1], frame.shape[0]))
    for shift in range(5):
        writer.write(np.roll(frame[..., ::-1], shift, axis=1))
    writer.release()


@pytest.mark.usefixtures("_pictures")
def test_every_line_of_ours_runs() -> None:
    names: dict[str, object] = {}
    exec("import cv2", names)
    for line in lines_of_ours(PAGE.read_text(encoding="utf-8")):
        if line.startswith("yolonas "):
            result = CliRunner().invoke(main, shlex.split(line)[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            try:
                exec(compile(line, "python/README.md", "exec"), names)
            except Exception as error:
                pytest.fail(f"{line}\n{type(error).__name__}: {error}")
    assert Path("boxes.jpg").is_file()
    assert Path("predictions/predictions.json").is_file()
    assert Path("second.onnx").is_file()
