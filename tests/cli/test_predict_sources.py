"""`yolonas predict` on videos, streams and bad files, and what it writes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result

from moving_pictures import FPS, send, send_motion_jpeg, web_server, write_video
from yolonas.cli import main
from yolonas.cli.predict import Tracking, class_numbers
from yolonas.data.readers import read_dataset
from yolonas.inference.detector import Detector
from yolonas.inference.sources import iter_sources, read_image, write_image
from yolonas.inference.video import Frame, Video

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def still(index: int) -> np.ndarray:
    """The same picture all the time, so that every object stays where it is; a corner counts the frames."""
    picture = NOISE.copy()
    picture[:8, :8] = 20 + 5 * index
    return picture


def predict(weights: Path, *arguments: object) -> Result:
    given = [str(argument) for argument in ("predict", "--weights", weights, "--device", "cpu", *arguments)]
    return CliRunner().invoke(main, given, catch_exceptions=False)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def frames_of(path: Path) -> list[Frame]:
    found = list(iter_sources(path))
    assert all(isinstance(frame, Frame) for frame in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("stride", [1, 3])
def test_a_video_becomes_a_video_of_the_same_time(weights: Path, tmp_path: Path, stride: int) -> None:
    path, out = write_video(tmp_path / "clip.avi", 10, still), tmp_path / "out"
    result = predict(weights, "--source", path, "--out", out, "--vid-stride", stride)
    assert result.exit_code == 0, result.output
    assert files(out) == ["clip.avi.mp4"]
    capture = cv2.VideoCapture(str(out / "clip.avi.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(FPS / stride, rel=1e-3)
    written = frames_of(out / "clip.avi.mp4")
    assert len(written) == len(range(0, 10, stride))
    assert f"{len(written)} frames, " in result.output
    expected = next(iter(Detector(weights, "cpu").stream(path))).plot()
    assert np.abs(written[0].image.astype(int) - expected).mean() < 25, "noise suffers, boxes show"


def test_a_single_frame_and_odd_sides_make_a_video_too(weights: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "one.avi", 1, lambda _: NOISE[:59, :79])
    result = predict(weights, "--source", path, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (frame,) = frames_of(tmp_path / "out/one.avi.mp4")
    assert frame.image.shape == (58, 78, 3), "MPEG-4 has even sides"


def test_every_output_of_images_and_videos_at_once(weights: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    write_image(folder / "a.png", NOISE)
    write_video(folder / "clip.mp4", 4, still)
    saving = ("--save-json", "--save-jsonl", "--save-coco", "--save-txt", "--save-conf", "--save-crop", "--save-frames")
    result = predict(weights, "--source", folder, "--out", out, "--vid-stride", "2", "--conf", "0.8", *saving)
    assert result.exit_code == 0, result.output
    assert "1 images and 2 frames, " in result.output
    stems = ["a", "clip_000000", "clip_000002"]
    found = list(Detector(weights, "cpu").stream(folder, conf=0.8, stride=2))
    assert [len(d) for d in found] != [0, 0, 0]
    plain = [name for name in files(out) if not name.startswith("crops/")]
    frames, labels = [f"frames/{stem}.jpg" for stem in stems[1:]], [f"labels/{stem}.txt" for stem in stems]
    assert plain == ["a.png", "clip.mp4", "coco.json", *frames, *labels, "predictions.json", "predictions.jsonl"]

    document = json.loads((out / "predictions.json").read_text())
    assert document == [d.to_dict() for d in found]
    assert [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()] == document
    assert [(entry.get("frame"), entry.get("time")) for entry in document] == [(None, None), (0, 0.0), (2, 0.2)]

    coco = json.loads((out / "coco.json").read_text())
    assert [image["file_name"] for image in coco["images"]] == [str(folder / "a.png"), *(f"{s}.jpg" for s in stems[1:])]
    assert [image.get("frame") for image in coco["images"]] == [None, 0, 2]
    assert len(coco["annotations"]) == sum(map(len, found))
    assert {a["image_id"] for a in coco["annotations"]} == {i for i, d in enumerate(found, start=1) if len(d)}
    assert [category["name"] for category in coco["categories"]] == ["cat", "dog", "bird"]

    for stem, d in zip(stems, found, strict=True):
        rows = [line.split() for line in (out / f"labels/{stem}.txt").read_text().splitlines()]
        assert [int(row[0]) for row in rows] == d.labels.tolist()
        numbers = np.array([row[1:] for row in rows], float).reshape(-1, 5)
        centres, sides = numbers[:, :2] * [80, 60], numbers[:, 2:4] * [80, 60]
        np.testing.assert_allclose(np.concatenate([centres - sides / 2, centres + sides / 2], 1), d.boxes, atol=2e-3)
        np.testing.assert_allclose(numbers[:, 4], d.scores, atol=1e-6)
        for number, box in enumerate(d, start=1):
            x1, y1, x2, y2 = box.box
            crop = read_image(out / f"crops/{box.name}/{stem}_{number}.jpg")
            assert crop.shape == (int(np.ceil(y2)) - int(y1), int(np.ceil(x2)) - int(x1), 3)
    assert len(files(out / "crops")) == sum(map(len, found))


def test_frames_and_labels_are_a_data_set(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write_video(tmp_path / "clip.mp4", 3, still)
    result = predict(
        weights, "--source", path, "--out", out, "--save-txt", "--save-frames", "--save-coco", "--no-images"
    )
    assert result.exit_code == 0, result.output
    (out / "frames").rename(out / "images")
    (out / "classes.txt").write_text("cat\ndog\nbird\n")
    data = read_dataset(out)
    assert (len(data), data.dropped) == (3, [])
    expected = list(Detector(weights, "cpu").stream(path))
    assert [len(image.boxes) for image in data.images] == [len(d) for d in expected]
    (out / "coco.json").rename(out / "images/coco.json")
    assert len(read_dataset(out / "images/coco.json")) == 3


def test_tracks_reach_every_output(weights: Path, tmp_path: Path) -> None:
    path, out = write_video(tmp_path / "clip.mp4", 6, still), tmp_path / "out"
    saving = ("--save-jsonl", "--save-txt", "--save-coco")
    other = write_video(tmp_path / "other.mp4", 3, still)
    result = predict(weights, "--source", path, "--source", other, "--out", out, "--track", *saving)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    tracks = [{d["track_id"]: d["name"] for d in line["detections"]} for line in lines]
    assert all(len(line["detections"]) == len(found) > 0 for line, found in zip(lines, tracks, strict=True))
    assert len(set(tracks[1]) & set(tracks[5])) > 0.7 * len(tracks[1]), "what stays keeps its number"
    for one, two in itertools.combinations(tracks[:6], 2):
        assert all(two[number] == name for number, name in one.items() if number in two), "and its class"
    assert sorted(tracks[6]) == list(range(1, len(tracks[6]) + 1)), "another video starts from 1"
    coco = json.loads((out / "coco.json").read_text())
    assert [a["track_id"] for a in coco["annotations"]] == [d["track_id"] for line in lines for d in line["detections"]]
    first = (out / "labels/clip_000000.txt").read_text().splitlines()
    assert [int(row.split()[5]) for row in first] == [d["track_id"] for d in lines[0]["detections"]]


def test_images_in_a_row_are_one_sequence() -> None:
    assert (Tracking(0.4).high, Tracking(0.4).low, Tracking(0.05).low) == (0.4, 0.1, 0.05)
    assert Tracking(0.4, lowest=0.25).low == 0.25  # of a file with its NMS inside


def test_classes_and_agnostic_nms(weights: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", NOISE)

    def found(*options: object) -> list[dict[str, object]]:
        where = ("--source", tmp_path / "a.png", "--out", tmp_path / "out", "--no-images", "--save-json")
        result = predict(weights, *where, *options)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "out/predictions.json").read_text())[0]["detections"]

    plain, agnostic = found(), found("--agnostic-nms")
    assert {d["name"] for d in plain} == {"cat", "dog", "bird"}
    assert 0 < len(agnostic) < len(plain)
    for options in (("--classes", "cat,2"), ("--classes", "bird", "--classes", "0")):
        assert found(*options) == [d for d in plain if d["name"] != "dog"]
    few = found("--classes", "dog", "--max-det", "3")
    assert few == [d for d in plain if d["name"] == "dog"][:3], "the others do not fill up max_det"
    alone = found("--classes", "dog", "--agnostic-nms")
    assert alone == [d for d in plain if d["name"] == "dog"], "and suppress nothing"


def test_class_numbers() -> None:
    names = ("cat", "traffic light", "fork, knife", "7")
    assert class_numbers(["cat, 1"], names) == [0, 1]
    assert class_numbers(["fork, knife", "7"], names) == [2, 3], "a class whose name is a number goes first"
    assert class_numbers([], names) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "horse"], "there is no class 'horse' among 3: cat, dog, bird"),
        (["--classes", "3"], "there is no class '3' among 3"),
        (["--vid-stride", "0"], "0 is not in the range x>=1"),
        (["--source", "s3://bucket/a.jpg"], "s3://bucket/a.jpg is an address of a kind that is not read, s3"),
        (["--out", "."], "would overwrite a.png: choose another folder than ."),
        (["--save-jsonl", "no/such/x.jsonl"], "no/such/x.jsonl cannot be written: No such file or directory"),
        (["--save-txt", "--out", "out2"], "the folder out2/labels cannot be made: File exists"),
    ],
)
def test_what_is_wrong_gets_one_sentence_before_anything_is_written(
    weights: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_image(Path("a.png"), NOISE)
    Path("out2").mkdir()
    Path("out2/labels").write_text("")
    before = Path("a.png").read_bytes()
    result = predict(weights, "--source", "a.png", "--out", "out", *options)
    assert result.exit_code in (1, 2)
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert Path("a.png").read_bytes() == before


def pixel_bomb() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_bad_files_get_a_sentence_each_and_the_rest_goes_on(weights: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("good.png", "also_good.jpg"):
        write_image(folder / name, NOISE)
    jpeg, clip = (folder / "also_good.jpg").read_bytes(), write_video(tmp_path / "clip.avi", 40, still).read_bytes()
    damaged = bytearray(cv2.imencode(".png", NOISE)[1].tobytes())
    damaged[3000:3200] = bytes(200)
    bad = {
        "corrupted.png": (bytes(damaged), "is damaged, or not an image"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "is a truncated JPEG file"),
        "zero.jpg": (b"", "is empty"),
        "bomb.png": (pixel_bomb(), "declares 10000000000 pixels"),
        "text.jpg": (b"This is not a picture.", "is damaged, or not an image"),
        "page.jpg": (b"<!DOCTYPE html><title>404</title>", "is an HTML page, not an image"),
        "broken.avi": (clip[: len(clip) // 2], "is truncated or damaged: "),
        "zero.mp4": (b"", "is empty"),
        "text.mp4": (b"This is no film.", "is damaged, or not a video"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    missing = tmp_path / "missing.mov"
    result = predict(weights, "--source", folder, "--source", missing, "--out", tmp_path / "out", "--save-json")
    assert result.exit_code == 0, result.output
    head, *lines = result.stderr.splitlines()
    assert head == "10 of 12 sources could not be read to the end:"
    assert len(lines) == 10
    for name, (_, message) in {**bad, "missing.mov": (b"", "cannot be read: No such file")}.items():
        (line,) = [line for line in lines if name in line]
        assert message in line, line
    entries = json.loads((tmp_path / "out/predictions.json").read_text())
    paths = [Path(entry["path"]).name for entry in entries]
    kept = paths.count("broken.avi")
    assert 5 < kept < 35, "the frames before the break are kept"
    assert sorted(set(paths)) == ["also_good.jpg", "broken.avi", "good.png"]
    assert len(frames_of(tmp_path / "out/in/broken.avi.mp4")) == kept
    assert f"2 images and {kept} frames" in result.output


def test_web_addresses(weights: Path, tmp_path: Path) -> None:
    picture = write_image(tmp_path / "x.png", NOISE).read_bytes()

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/photos/dog.png"):
            send(request, picture, "image/png")
        else:
            send(request, b"", "text/html", 404)

    with web_server(answer) as address:
        urls = [f"{address}/photos/dog.png?size=big", f"{address}/gone.jpg"]
        sources = [argument for url in urls for argument in ("--source", url)]
        result = predict(weights, *sources, "--out", tmp_path / "out", "--save-json", "--save-txt")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == ["dog.png", "labels/dog.txt", "predictions.json"]
    assert result.stderr.splitlines()[-1] == f"  {urls[1]} cannot be downloaded: the server answers 404 Not Found"
    assert json.loads((tmp_path / "out/predictions.json").read_text())[0]["path"] == urls[0]


class VanishingCamera:
    """A camera that is pulled out after some frames."""

    def __init__(self, frames: int) -> None:
        self.left = frames

    def isOpened(self) -> bool:
        return True

    def grab(self) -> bool:
        time.sleep(0.05)
        self.left -= 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, NOISE

    def release(self) -> None:
        pass


def test_a_vanishing_camera_keeps_what_was_found(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolonas.inference.live.RECONNECT_AFTER", (0.01, 0.01))
    waiting = [VanishingCamera(20)]
    monkeypatch.setattr(Video, "open", lambda self: waiting.pop() if waiting else cv2.VideoCapture())
    out = tmp_path / "out"
    result = predict(weights, "--source", "0", "--out", out, "--save-jsonl", "--track")
    assert result.exit_code == 0, result.output
    head, line = result.stderr.splitlines()
    assert head == "1 of 1 sources could not be read to the end:"
    assert line == "  camera 0 was lost after 20 frames, and 2 attempts to connect again failed"
    entries = [json.loads(text) for text in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(entries) > 2
    assert {entry["path"] for entry in entries} == {"camera 0"}
    monkeypatch.undo()
    written = frames_of(out / "camera_0.mp4")
    assert len(written) == pytest.approx(entries[-1]["time"] * 15, abs=2), "the video keeps the time"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_stopping_an_endless_stream_finishes_the_files(weights: Path, tmp_path: Path, stop: signal.Signals) -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            time.sleep(0.02)
            yield NOISE

    out = tmp_path / "out"
    with web_server(lambda request: send_motion_jpeg(request, endless())) as address:
        arguments = [
            "predict",
            "--source",
            f"{address}/live.mjpg",
            "--weights",
            weights,
            "--device",
            "cpu",
            "--out",
            out,
        ]
        saving = ["--save-json", "--save-jsonl", "--save-coco"]
        command = f"from yolonas.cli import main; main({[*map(str, arguments), *saving]})"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        watch = threading.Timer(90, process.kill)
        watch.start()
        lines = out / "predictions.jsonl"
        while process.poll() is None and (not lines.exists() or len(lines.read_text().splitlines()) < 4):
            time.sleep(0.05)
        process.send_signal(stop)
        output, errors = process.communicate()
        watch.cancel()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(entries) >= 4, "each line is there as soon as it is found"
    assert json.loads((out / "predictions.json").read_text()) == entries
    assert len(json.loads((out / "coco.json").read_text())["images"]) == len(entries)
    assert f"{len(entries)} frames, " in output
    assert len(frames_of(out / "live.mjpg.mp4")) > 1
