"""`yolonas benchmark`: what it measures, lists, writes and draws; and the published table, for its mechanics."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result

from yolonas import benchmark, checkpoint, coco_benchmark
from yolonas.benchmark import Contender, Left, Machine, Row
from yolonas.benchmark_report import markdown, picture
from yolonas.cli import main
from yolonas.data import samples
from yolonas.model import Preprocessing, YoloNAS

MACHINE = Machine("2026-11-22", "A Processor", 4, {"yolonas": "0.1.0", "openvino": "2026.4"}, "abc1234")
ROW = Row(
    *("n.safetensors", "n", "openvino", "fp32", "cpu", 2, (64, 64), 1, 5),
    *(1.0, 8.0, 0.5, 10.0, 4.1, 0.5, 0.8, MACHINE),
)  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["benchmark", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "parts.safetensors"
    model = YoloNAS("n", 3, class_names=samples.NAMES, preprocessing=Preprocessing.square(96)).eval()
    checkpoint.save(checkpoint.Checkpoint(model), path)
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    samples.generate(folder, 6, image_size=(128, 160))
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "benchmark-cache"))


def test_every_way_is_measured_or_listed_with_its_reason(weights: Path, parts: Path, tmp_path: Path) -> None:
    result = run("--weights", weights, "--data", parts, "--batch", "1,2", "--repeats", "2", "--threads", "1")
    assert result.exit_code == 0, result.output
    out = tmp_path / "benchmark"
    document = json.loads((out / "benchmark.json").read_text())
    ways = {("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")}
    ways |= {("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8")}
    rows = document["rows"]
    assert {(row["runtime"], row["precision"], row["batch"]) for row in rows} == {
        (*way, n) for way in ways for n in (1, 2)
    }
    for row in rows:
        assert min(row["letterbox"], row["network"], row["post"], row["total"]) > 0
        assert (row["rounds"], row["threads"], row["image_size"]) == (2, 1, [96, 96])
        assert row["ap"] is not None
        assert {"python", "yolonas", "torch", "openvino"} <= set(row["machine"]["versions"])
        assert row["machine"]["processor"]
        assert row["machine"]["date"]
    sizes = {(row["runtime"], row["precision"]): row["megabytes"] for row in rows}
    assert sizes["openvino", "int8"] < 0.5 * sizes["openvino", "fp32"]
    left = {entry["contender"]: entry["reason"] for entry in document["not_measured"]}
    assert left["parts.safetensors torch int8"] == "INT8 is of the runtimes onnxruntime and openvino"
    assert "bf16" in left["parts.safetensors onnxruntime bf16"]
    text = (out / "benchmark.md").read_text()
    assert text in result.output
    assert len([line for line in text.splitlines() if line.startswith("| parts")]) == len(rows)
    assert ElementTree.fromstring((out / "benchmark.svg").read_text()).tag.endswith("svg")


def test_an_exported_file_takes_part_in_its_own_precision(weights: Path, tmp_path: Path) -> None:
    from yolonas.export import export_raw_onnx

    export_raw_onnx(checkpoint.load(weights), tmp_path / "parts.onnx")
    result = run("--weights", "parts.onnx", "--batch", "1", "--repeats", "1", "--runtime", "onnxruntime,torch")
    assert result.exit_code == 0, result.output
    assert "| parts.onnx | onnxruntime" in result.output
    assert "parts.onnx torch fp32: runtime 'torch' does not run parts.onnx" in result.output
    assert "Timed on drawn images." in result.output
    assert not (tmp_path / "benchmark" / "benchmark.svg").exists(), "no AP to draw"


def test_int8_without_images_is_listed(weights: Path) -> None:
    result = run("--weights", weights, "--precision", "int8", "--runtime", "openvino", "--repeats", "1")
    assert result.exit_code == 1
    assert "INT8 needs images to calibrate on: give --data or --source" in result.output
    assert "Error: nothing could be measured" in result.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--runtime", "tensorrt"), "'tensorrt' is not one of torch, onnxruntime, openvino"),
        (("--batch", "1,0"), "'1,0' is no list of batch sizes"),
        (("--data", "nowhere"), "no data set at nowhere"),
        (("--weights", "nowhere.pth"), "nowhere.pth is not a file"),
        (("--coco", "."), "is no folder: with --coco give the folder of yolo_nas_s_coco.pth"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], sentence: str, weights: Path) -> None:
    result = run("--weights", weights, *arguments)
    assert result.exit_code != 0
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_contenders_take_turns_and_medians_are_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    class Fake:
        def __init__(self, name: str, seconds: tuple[float, ...]) -> None:
            self.name, self.seconds = name, iter([9.0, *seconds])

        def predict_batch(self, images: list, batch: int) -> None:
            assert len(images) == batch == 2

    def turn(detector: Fake, images: list) -> tuple[float, ...]:
        turns.append(detector.name)
        return (next(detector.seconds),) * 4

    monkeypatch.setattr(benchmark, "_turn", turn)
    a, b = Contender(Path("a"), "torch", "fp32"), Contender(Path("b"), "torch", "fp32")
    detectors = {a: Fake("a", (0.02, 0.04, 0.9)), b: Fake("b", (0.2, 0.4, 0.6))}
    found = benchmark.measure(detectors, [np.zeros((4, 4, 3), np.uint8)], 2, repeats=3)  # type: ignore[arg-type]
    assert turns == ["a", "b"] * 4
    assert (found[a].network, found[b].total, found[a].rounds) == (20.0, 200.0, 3)


def test_the_picture_holds_every_point_and_the_front_leaves_out_what_is_beaten() -> None:
    def row(name: str, ms: float, ap: float | None) -> Row:
        return dataclasses.replace(ROW, weights=name, total=ms, ap=ap)

    rows = [row("s.pt", 10, 0.4), row("m.pt", 20, 0.5), row("slow.pt", 40, 0.45), row("<none>.pt", 5, None)]
    root = ElementTree.fromstring(picture(rows, "S & M"))
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert titles[0] == "S & M: 3 points"
    assert {title.split(",")[0] for title in titles[1:]} == {"s.pt", "m.pt", "slow.pt"}
    (front,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    assert len(front.attrib["points"].split()) == 2
    with pytest.raises(ValueError, match="no AP to draw"):
        picture([row("s.pt", 10, None)])


def test_the_table_says_where_and_when() -> None:
    text = markdown([ROW], [Left("n.pt torch int8", "no INT8 there")], ["AP on 5 images."])
    assert text.startswith("A Processor, 4 cores; yolonas 0.1.0, openvino 2026.4.\nAP on 5 images.\n")
    assert (
        "| n.safetensors | openvino 2026.4 | fp32 | 1 | 64x64 | 1 | 8 | 0.5 | 10 | 100.0 | 0.5000 | 0.8000 | 4.1 | 2 |"
        in text
    )
    assert "| 2026-11-22 | abc1234 |" in text
    assert "- n.pt torch int8: no INT8 there" in text


# -- the published table -----------------------------------------------------------------------------------------------


@pytest.fixture
def coco(shared: Path, tmp_path: Path) -> Path:
    """COCO's layout, with a few of the permissively licensed images of val2017."""
    source = shared / "data" / "coco_permissive"
    document = json.loads((source / "instances.json").read_text())
    document["images"] = document["images"][:6]
    kept = {image["id"] for image in document["images"]}
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] in kept]
    folder = tmp_path / "coco"
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(document))
    (folder / "val2017").mkdir()
    for image in document["images"]:
        shutil.copy(source / "images" / Path(image["file_name"]).name, folder / "val2017")
    return folder


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with an S under its published name, of random weights: for the mechanics."""
    folder = tmp_path / "published"
    folder.mkdir()
    checkpoint.save(checkpoint.Checkpoint(YoloNAS("s", 80).eval()), folder / "yolo_nas_s_coco.safetensors")
    return folder


def test_the_published_table(coco: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--coco", coco, "--weights", published, "--imgsz", "64", "--repeats", "1", "--runtime", "openvino")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "no yolo_nas_m_coco.pth, so M is left out" in result.output
    rows = json.loads((tmp_path / "benchmark" / "coco.json").read_text())
    assert [(row["variant"], row["precision"], row["published_ap"]) for row in rows] == [
        ("s", "fp32", 47.5),
        ("s", "int8", 47.03),
    ]
    for row in rows:
        assert row["error"] is None
        assert 0 <= row["ap"] <= 100
        assert row["network"] > 0
        assert (row["images"], row["pinned"]) == (6, False)
    assert rows[1]["calibration"] == "6 images of val2017, which AP is of"
    text = (tmp_path / "benchmark" / "coco.md").read_text()
    assert "INT8 calibrated on 6 images of val2017, which AP is of." in text
    assert "| YOLO-NAS S | fp32 | openvino |" in text

    # Cut while it ran, with half a line written: what is there is not made again, and the figures are the same.
    log = tmp_path / "benchmark" / "detections" / "s-openvino-fp32.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:4]) + lines[5][:30])
    asked: list[int] = []
    stream = coco_benchmark._detections

    def spy(detector: object, data: object, path: Path, head: object) -> object:
        before = len(coco_benchmark._read_log(path, json.dumps(head, sort_keys=True), data, detector.names))  # type: ignore
        asked.append(before)
        return stream(detector, data, path, head)  # type: ignore[arg-type]

    monkeypatch.setattr(coco_benchmark, "_detections", spy)
    assert run(*command, "--precision", "fp32").exit_code == 0
    assert asked == [1], "the whole lines were kept"
    (again,) = json.loads((tmp_path / "benchmark" / "coco.json").read_text())
    assert again["ap"] == rows[0]["ap"]


def test_what_the_published_table_lacks_is_named(coco: Path, published: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("--coco", coco, "--weights", empty)
    assert (
        "holds no published weights: put yolo_nas_s_coco.pth, yolo_nas_m_coco.pth, yolo_nas_l_coco.pth" in result.output
    )
    result = run("--coco", empty, "--weights", published)
    assert "lacks annotations/instances_val2017.json and val2017: unpack COCO's val2017" in result.output
    assert result.exit_code == 1
