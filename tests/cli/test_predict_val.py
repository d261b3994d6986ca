"""`yolonas predict` and `yolonas val`, as people call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from yolonas.cli import main
from yolonas.data.readers import read_dataset
from yolonas.inference.detector import Detector
from yolonas.inference.outputs import picture_names
from yolonas.inference.sources import read_image, write_image


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for i, name in enumerate(("a.jpg", "a.png", "b.bmp", "sub/a.jpg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(folder / name, np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def predict(weights: Path, source: object, out: Path, *more: object) -> Result:
    return run("predict", "--source", source, "--weights", weights, "--device", "cpu", "--out", out, *more)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_predict_writes_pictures_json_and_coco_json(weights: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    result = predict(weights, images, out, "--save-json", "--save-coco")
    assert result.exit_code == 0, result.output
    assert files(out) == ["a.jpg", "a.png", "b.bmp.jpg", "coco.json", "predictions.json"]
    assert (read_image(out / "a.png") != read_image(images / "a.png")).any()
    expected = Detector(weights, "cpu")(images)
    document = json.loads((out / "predictions.json").read_text())
    assert [entry["path"] for entry in document] == [str(images / name) for name in ("a.jpg", "a.png", "b.bmp")]
    assert [len(entry["detections"]) for entry in document] == [len(d) for d in expected]
    coco = json.loads((out / "coco.json").read_text())
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog", "bird"]
    assert len(coco["annotations"]) == sum(map(len, expected)) > 0
    first, box = coco["annotations"][0], expected[0].boxes[0]
    np.testing.assert_allclose(first["bbox"], [*box[:2], *(box[2:] - box[:2])], atol=2e-3)
    assert first["category_id"] == expected[0].labels[0] + 1
    assert f"3 images, {sum(map(len, expected))} objects" in result.output


def test_the_coco_json_is_a_data_set(weights: Path, images: Path, tmp_path: Path) -> None:
    result = predict(weights, images, tmp_path / "out", "--no-images", "--save-coco", tmp_path / "labels.json")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == []
    data = read_dataset(tmp_path / "labels.json")
    assert (len(data), data.dropped) == (3, [])
    result = run("val", "--weights", weights, "--data", tmp_path / "labels.json", "--conf", "0.5", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "AP50 1.0000" in result.output


def test_sub_folders_keep_their_place(weights: Path, images: Path, tmp_path: Path) -> None:
    result = predict(weights, images / "**" / "*.jpg", tmp_path / "out", "--source", images / "a.png")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == ["a.jpg", "a.png", "sub/a.jpg"]


def test_no_two_pictures_share_a_name() -> None:
    paths = [Path(name) for name in ("x/a.bmp", "x/a.bmp.jpg", "x/A.BMP.jpg", "x/a.jpg", "x/y/a.jpg", "x/a.webp")]
    names = [str(name) for name in picture_names(paths)]
    assert names == ["a.bmp.jpg", "a.bmp_2.jpg", "A.BMP_3.jpg", "a.jpg", "y/a.jpg", "a.webp.jpg"]
    assert picture_names([Path("/data/one/a.jpg"), Path("/data/two/a.jpg")]) == [Path("one/a.jpg"), Path("two/a.jpg")]
    assert picture_names([]) == []


def test_unreadable_images_are_listed_at_the_end(weights: Path, images: Path, tmp_path: Path) -> None:
    (images / "a.png").write_bytes(b"no image")
    result = predict(weights, images, tmp_path / "out", "--source", tmp_path / "missing.jpg", "--save-json")
    assert result.exit_code == 0, result.output
    assert "2 of 4 images could not be read:" in result.stderr
    assert "a.png is damaged" in result.stderr
    assert "missing.jpg cannot be read: No such file" in result.stderr
    assert files(tmp_path / "out") == ["images/a.jpg", "images/b.bmp.jpg", "predictions.json"]


def test_nothing_readable_is_an_error(weights: Path, tmp_path: Path) -> None:
    result = predict(weights, tmp_path / "missing.jpg", tmp_path / "out")
    assert result.exit_code == 1
    assert "missing.jpg cannot be read: No such file" in result.stderr
    assert result.stderr.splitlines()[-1] == "Error: no image could be read"


def test_options_of_the_detector_reach_it(weights: Path, images: Path, tmp_path: Path) -> None:
    def count(*options: object) -> int:
        predict(weights, images / "a.jpg", tmp_path / "out", "--no-images", "--save-json", *options)
        return len(json.loads((tmp_path / "out" / "predictions.json").read_text())[0]["detections"])

    plain = count()
    assert plain == len(Detector(weights, "cpu")(images / "a.jpg"))
    assert count("--conf", "0.8") < plain < count("--conf", "0.1")
    assert count("--iou", "1") > plain
    assert count("--max_det", "2") == count("--max-det", "2") == 2
    assert count("--imgsz", "96") != plain or count("--imgsz", "64,128") != plain
    assert count("--batch", "1") == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--conf", "1.5"], "1.5 is not in the range 0<=x<=1"),
        (["--iou", "-1"], "-1.0 is not in the range"),
        (["--imgsz", "333"], "333 is not a multiple of 32; the nearest is 320"),
        (["--imgsz", "abc"], "'abc' is not a size: write 640, or 384,640"),
        (["--device", "cuda:77"], "device 'cuda:77' does not exist"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--max-det", "0"], "0 is not in the range x>=1"),
        (["--weights", "none.pth"], "none.pth"),
        (["--source", "nowhere/*.jpg"], "no image matches the pattern nowhere/*.jpg"),
        (["--source", "."], "no image matches the folder ."),
        (["--out", "taken"], "the folder taken cannot be made"),
        (["--save-json", "no/such/folder.json"], "no/such/folder.json cannot be written: No such file or directory"),
    ],
)
def test_what_is_wrong_gets_one_sentence(
    weights: Path, images: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    Path("taken").write_text("")
    result = predict(weights, images, Path("out"), *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in result.output


def yolo(folder: Path, weights: Path) -> Path:
    """A data set labelled by the model itself."""
    detector = Detector(weights, "cpu")
    for split in ("train", "val"):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
        for i in range(3):
            path = folder / "images" / split / f"{i}.png"
            write_image(path, np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8))
            lines = [
                f"{d.label} {(x1 + x2) / 120} {(y1 + y2) / 80} {(x2 - x1) / 60} {(y2 - y1) / 40}"
                for d in detector(path)
                for x1, y1, x2, y2 in [d.box.tolist()]
            ]
            (folder / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    (folder / "classes.txt").write_text("cat\ndog\nbird\n")
    return folder


def test_val_reads_folders_and_yaml_and_writes_json(weights: Path, tmp_path: Path) -> None:
    folder = yolo(tmp_path / "set", weights)
    (tmp_path / "data.yaml").write_text("path: set\ntrain: images/train\nval: images/val\nnames: [Cat, Dog, Bird]\n")
    for data, split in ((folder, []), (folder, ["--split", "train"]), (tmp_path / "data.yaml", [])):
        figures = tmp_path / "figures.json"
        options = ["--conf", "0.5", "--device", "cpu", "--json", figures, "--model", weights, *split]
        result = run("val", "--data", data, *options)
        assert result.exit_code == 0, result.output
        document = json.loads(figures.read_text())
        assert document["ap50"] == pytest.approx(1, abs=0.01)
        assert document["images"] == 3
        assert f"AP {document['ap']:.4f}" in result.output
        assert {name.lower() for name in document["per_class"]} <= {"cat", "dog", "bird"}


def test_val_writes_a_report(weights: Path, tmp_path: Path) -> None:
    folder = yolo(tmp_path / "set", weights)
    page = tmp_path / "report.html"
    options = ["--data", folder, "--weights", weights, "--device", "cpu", "--report"]
    result = run("val", *options, page)
    assert result.exit_code == 0, result.output
    assert f"Wrote {page}" in result.output
    text = page.read_text(encoding="utf-8")
    assert "<title>n.safetensors on set, val</title>" in text
    assert "The operating threshold, 0.500, is the checkpoint" in text
    assert "data:image/" not in text, "no error, no picture"
    result = run("val", *options, tmp_path / "no" / "report.html")
    assert result.exit_code == 1
    assert "report.html cannot be written: No such file or directory" in result.stderr


def test_val_says_what_it_left_out(weights: Path, tmp_path: Path) -> None:
    folder = yolo(tmp_path, weights)
    (folder / "labels/val/0.txt").write_text("7 0.5 0.5 0.1 0.1\n" * 12)
    result = run("val", "--data", folder, "--weights", weights, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "12 entries of the data set were left out:" in result.stderr
    assert "0.txt, line 1: there is no class 7 among 3" in result.stderr
    assert "and 2 more" in result.stderr


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ("cat\ndog\nbird\n", ["--split", "test"], "has no part 'test', it has the parts train, val"),
        ("cat\ndog\nbird\n", ["--data", "nowhere"], "no data set at nowhere"),
        ("x\ny\nz\n", [], "no class in common: the model knows cat, dog, bird; the data has x, y, z"),
        ("cat\ncat\n", [], "must name each class once"),
    ],
)
def test_val_errors(weights: Path, tmp_path: Path, classes: str, options: list[str], message: str) -> None:
    folder = yolo(tmp_path, weights)
    (folder / "classes.txt").write_text(classes)
    result = run("val", "--data", folder, "--weights", weights, "--device", "cpu", *options)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_val_without_objects(weights: Path, tmp_path: Path) -> None:
    folder = yolo(tmp_path, weights)
    for path in (folder / "labels/val").iterdir():
        path.write_text("")
    result = run("val", "--data", folder, "--weights", weights)
    assert result.exit_code == 1
    assert "has no object in its 3 images" in result.stderr


def python(code: str, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, sys.path)])}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_command_in_a_process_of_its_own(weights: Path, images: Path, tmp_path: Path) -> None:
    arguments = ["yolonas", "predict", "--source", images, "--weights", weights, "--out", tmp_path / "out"]
    done = python(f"import sys; sys.argv = {[str(a) for a in arguments]}; from yolonas.cli import main; main()")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == ["a.jpg", "a.png", "b.bmp.jpg"]


def test_help_needs_neither_torch_nor_opencv() -> None:
    code = """
import sys
sys.argv = ["yolonas", "--help"]
from yolonas.cli import main
try:
    main()
except SystemExit:
    pass
for name in ("torch", "cv2", "numpy"):
    assert name not in sys.modules, name
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    for command in ("predict", "val", "train", "info"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("package", "arguments"), [("torch", ["predict"]), ("cv2", ["predict"]), ("click", ["--help"])]
)
def test_a_missing_package_gets_a_sentence(tmp_path: Path, package: str, arguments: list[str]) -> None:
    # What importing a package does that is not installed.
    (tmp_path / f"{package}.py").write_text(f'raise ModuleNotFoundError("No module named {package}", name="{package}")')
    argv = ["yolonas", *arguments]
    if arguments == ["predict"]:
        argv += ["--source", "a.jpg", "--weights", "yolo_nas_n_bccd"]
    done = python(f"import sys; sys.argv = {argv}; from yolonas.cli import main; main()", tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert f"needs {package}" in done.stderr
    assert "pip install 'yolonas[detector]'" in done.stderr
    assert "Traceback" not in done.stderr
