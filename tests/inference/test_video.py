"""Frames of video files in order, frames of live sources as they are newest, and what is said of broken ones."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from moving_pictures import FPS, grey, index_of, send, send_motion_jpeg, web_server, write_video
from yolonas.checkpoint import Checkpoint
from yolonas.errors import DataError
from yolonas.inference import live, video
from yolonas.inference.detector import Detector
from yolonas.inference.sources import is_live, is_single, iter_sources, list_sources, origin, read_image
from yolonas.inference.video import Frame, Video, read_frame


def frames(source: object, stride: int = 1) -> tuple[list[Frame], list[str]]:
    items = list(iter_sources(source, stride))
    return [i for i in items if isinstance(i, Frame)], [str(i) for i in items if isinstance(i, DataError)]


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mov", ".mkv"])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_file_gives_its_frames_in_order(tmp_path: Path, suffix: str, stride: int) -> None:
    path = write_video(tmp_path / f"clip{suffix}")
    found, problems = frames(path, stride)
    assert problems == []
    assert [f.index for f in found] == list(range(0, 40, stride))
    assert [index_of(f.image) for f in found] == pytest.approx([f.index for f in found], abs=0.5)
    assert [f.time for f in found] == pytest.approx([f.index / FPS for f in found])
    assert not any(f.live for f in found)
    assert origin(found[1]) == (str(path), stride, stride / FPS)
    assert read_image(found[0]) is found[0].image


def test_colours_are_rgb(tmp_path: Path) -> None:
    red = np.zeros((64, 96, 3), np.uint8)
    red[..., 0] = 200
    found, _ = frames(write_video(tmp_path / "red.mp4", 2, lambda _: red))
    assert np.abs(found[1].image.astype(int) - red).max() < 12


def gif(path: Path, pictures: int = 6) -> Path:
    first, *rest = [Image.fromarray(grey(i * 5)) for i in range(pictures)]
    first.save(path, save_all=True, append_images=rest, duration=100)
    return path


def test_an_animated_gif_is_a_video_and_a_still_one_an_image(tmp_path: Path) -> None:
    found, problems = frames(gif(tmp_path / "moving.gif"))
    assert ([index_of(f.image) for f in found], problems) == ([0, 5, 10, 15, 20, 25], [])
    assert found[2].time == pytest.approx(0.2)
    still = gif(tmp_path / "still.gif", 1)
    assert list(list_sources(still)) == [still]
    assert list(list_sources(tmp_path / "none.gif")) == [tmp_path / "none.gif"]
    assert (is_single(still), is_single(tmp_path / "moving.gif")) == (True, False)


def test_a_folder_gives_its_images_and_then_its_videos(tmp_path: Path) -> None:
    for name in ("b.mp4", "d.AVI", ".hidden.mp4"):
        write_video(tmp_path / name, 2)
    for name in ("c.png", "a.jpg"):
        Image.fromarray(grey(1)).save(tmp_path / name)
    gif(tmp_path / "a.gif")
    (tmp_path / "readme.txt").write_text("")
    listed = list(list_sources(tmp_path))
    assert [item.name for item in listed[:2]] == ["a.jpg", "c.png"]
    assert listed[2:] == [Video(tmp_path / name) for name in ("a.gif", "b.mp4", "d.AVI")]
    assert list(list_sources(tmp_path / "*.mp4")) == [Video(tmp_path / "b.mp4")]
    assert not is_single(tmp_path / "b.mp4")
    assert not is_single(Video(tmp_path / "b.mp4"))


@pytest.mark.parametrize(("name", "kept"), [("clip.avi", 0.5), ("clip.mkv", 0.7)])
def test_a_truncated_video_gives_the_frames_before_the_break(tmp_path: Path, name: str, kept: float) -> None:
    path = write_video(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    found, (problem,) = frames([path, write_video(tmp_path / "next.mp4", 3)])
    first = [f.index for f in found if f.path == str(path)]
    assert first == list(range(len(first)))
    assert 5 < len(first) < 38
    assert problem == f"{path} is truncated or damaged: {len(first)} of its 40 frames could be read"
    assert len(found) - len(first) == 3, "the next video goes on"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "clip.mp4 is empty"),
        (b"no video at all", "clip.mp4 is damaged, or not a video that OpenCV can read"),
        (None, "clip.mp4 cannot be read: No such file or directory"),
        ("index", "clip.mp4 is damaged, or not a video that OpenCV can read"),
    ],
)
def test_what_is_no_video_gets_a_sentence(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "clip.mp4"
    if content == "index":  # an .mp4 has its index at the end
        write_video(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    assert frames(path) == ([], [f"{tmp_path}/{message}"])


def test_enormous_frames_are_refused_undecoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "clip.mp4", 3)
    monkeypatch.setattr(video, "MOST_FRAME_PIXELS", 96 * 64 - 1)
    assert frames(path)[1] == [f"{path} declares frames of 96 x 64, and larger than 8192 x 8192 is not read"]


def test_one_frame_by_its_index(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4")
    assert [index_of(read_frame(str(path), index)) for index in (0, 1, 17, 39)] == pytest.approx([0, 1, 17, 39], abs=1)
    with pytest.raises(DataError, match=r"clip\.mp4 has no frame 40"):
        read_frame(str(path), 40)


def test_memory_does_not_grow_with_the_video(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.avi", 150, lambda i: np.full((240, 320, 3), i, np.uint8))
    tracemalloc.start()
    count = sum(isinstance(frame, Frame) for frame in iter_sources(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 150
    assert peak < 10 * 240 * 320 * 3


class Camera:
    """A `cv2.VideoCapture` that gives a frame every `pause` seconds, `count` in all, and then nothing."""

    def __init__(self, count: int, pause: float = 0.0) -> None:
        self.left, self.pause, self.number = count, pause, -1
        self.released = False

    def isOpened(self) -> bool:
        return True

    def grab(self) -> bool:
        time.sleep(self.pause)
        self.left, self.number = self.left - 1, self.number + 1
        return self.left >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, grey(self.number % 40)

    def release(self) -> None:
        self.released = True


@pytest.fixture
def cameras(monkeypatch: pytest.MonkeyPatch) -> list[Camera]:
    """What opening a source gives, one after the other; after them nothing opens."""
    waiting: list[Camera] = []
    monkeypatch.setattr(Video, "open", lambda self: waiting.pop(0) if waiting else cv2.VideoCapture())
    monkeypatch.setattr(live, "RECONNECT_AFTER", (0.01, 0.02, 0.03))
    return waiting


@pytest.mark.parametrize("source", [0, "0", np.int64(0)])
def test_a_camera_is_named_by_its_number(source: object, cameras: list[Camera]) -> None:
    assert list(list_sources(source)) == [Video(0, live=True)]
    assert frames(source) == ([], ["camera 0 gives no picture: is it connected, and not in use by another program?"])


def test_what_is_live(tmp_path: Path) -> None:
    for source in (0, "1", "rtsp://127.0.0.1:9/x", "http://127.0.0.1:9/x.mjpg", ["a.jpg", 0], Video(0, live=True)):
        assert is_live(source), source
    for source in (
        tmp_path,
        "a.jpg",
        "*.mp4",
        "a.mp4",
        "http://127.0.0.1:9/a.jpg",
        grey(0),
        b"",
        True,
        [],
        Video(Path("a")),
    ):
        assert not is_live(source), source


def test_a_number_that_is_a_file_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("0").write_bytes(b"")
    assert list(list_sources("0")) == [Path("0")]


def test_a_slow_reader_gets_the_newest_frame(cameras: list[Camera]) -> None:
    camera = Camera(200, pause=0.005)
    cameras.append(camera)
    seen, lags = [], []
    for frame in iter_sources(0):
        if isinstance(frame, DataError):
            break
        lags.append(camera.number - frame.index)
        assert index_of(frame.image) == frame.index % 40
        seen.append(frame.index)
        assert frame.live
        time.sleep(0.05)  # ten frames
    assert seen == sorted(set(seen))
    assert 5 < len(seen) < 60, "frames were dropped"
    assert np.median(lags) <= 2
    assert camera.released


def test_a_camera_that_vanishes_is_connected_again_and_then_given_up(cameras: list[Camera]) -> None:
    cameras += [Camera(5, 0.005), Camera(0), Camera(3, 0.005)]
    found, problems = frames(0)
    assert found[-1].index == 7, "frames are counted on over an interruption"
    assert [f.time for f in found] == sorted(f.time for f in found)
    assert problems == ["camera 0 was lost after 8 frames, and 3 attempts to connect again failed"]


def test_a_camera_that_raises_ends_with_a_sentence(cameras: list[Camera], monkeypatch: pytest.MonkeyPatch) -> None:
    cameras.append(Camera(5))
    monkeypatch.setattr(Camera, "grab", lambda self: [][0])
    assert frames(0) == ([], ["camera 0 cannot be read: list index out of range"])


def test_leaving_a_live_source_releases_it(cameras: list[Camera]) -> None:
    camera = Camera(10**9, 0.001)
    cameras.append(camera)
    items = iter_sources(0)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert camera.released
    assert not any(thread.name == "yolonas camera 0" for thread in threading.enumerate())


def test_a_stride_over_a_live_source(cameras: list[Camera]) -> None:
    cameras.append(Camera(20, 0.005))
    found, _ = frames(0, 4)
    assert {f.index % 4 for f in found} == {0}


def test_a_motion_jpeg_stream_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "RECONNECT_AFTER", (0.01,))
    asked: list[str] = []

    def pictures() -> Iterator[np.ndarray]:
        for index in range(20):
            time.sleep(0.02)
            yield grey(index)

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        if len(asked) <= 2:  # the question what it is, and the first connection
            send_motion_jpeg(request, pictures())
        else:
            send(request, b"off", "text/plain", 503)

    with web_server(answer) as address:
        found, (problem,) = frames(f"{address}/camera?channel=1")
    assert len(found) > 5
    assert all(f.live and f.path == f"{address}/camera?channel=1" for f in found)
    indices = [index_of(f.image) for f in found]
    assert indices == sorted(indices)
    assert indices[-1] >= 15
    assert "was lost after" in problem
    assert problem.endswith("and 1 attempts to connect again failed")


def test_a_video_file_over_http(tmp_path: Path) -> None:
    content = write_video(tmp_path / "clip.mp4", 12).read_bytes()
    with web_server(lambda request: send(request, content, "video/mp4")) as address:
        for url in (f"{address}/clip.mp4?token=1", f"{address}/download"):
            assert list(list_sources(url)) == [Video(url)]
            assert not is_single(url)
            found, problems = frames(url)
            assert ([f.index for f in found], problems) == (list(range(12)), [])
    assert frames(f"{address}/clip.mp4")[1] == [
        f"{address}/clip.mp4 cannot be reached, or is not a video that OpenCV can read"
    ]


@pytest.mark.parametrize(
    "url", ["rtsp://u:secret@127.0.0.1:9/live", "http://127.0.0.1:9/x.m3u8", "rtmp://127.0.0.1:9/x"]
)
def test_streams_that_cannot_be_opened(url: str) -> None:
    assert list(list_sources(url)) == [Video(url, live=True)]
    _, (problem,) = frames(url)
    assert "gives no picture: check the address, and that the stream runs" in problem
    assert "secret" not in problem


def test_the_detector_streams_a_video_with_frames_and_times(tmp_path: Path, lively: Checkpoint) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (7, 64, 96, 3), dtype=np.uint8)
    path = write_video(tmp_path / "clip.mp4", 7, lambda i: noise[i])
    detector = Detector(lively, "cpu")
    found = list(detector.stream(str(path), batch=3, stride=2))
    assert [(d.path, d.frame, d.time) for d in found] == [(str(path), i, i / FPS) for i in (0, 2, 4, 6)]
    assert sum(map(len, found)) > 0
    for d in found:
        np.testing.assert_array_equal(d.image, read_frame(str(path), d.frame or 0))
        np.testing.assert_allclose(d.boxes, detector(d.image).boxes, atol=1e-3)  # type: ignore[union-attr]
    called = detector(path)
    assert isinstance(called, list)
    assert [d.frame for d in called] == list(range(7))
    assert called[3].image is None
    assert called[3].plot().shape == (64, 96, 3), "its pixels are read from the video again"
    with pytest.raises(ValueError, match="stride must be a whole number of at least 1, not 0"):
        detector.stream(path, stride=0)


def test_the_detector_on_a_camera(lively: Checkpoint, cameras: list[Camera]) -> None:
    detector = Detector(lively, "cpu")
    cameras.append(Camera(10**9, 0.002))
    snapshot = detector(0)
    assert (snapshot.path, snapshot.frame is not None) == ("camera 0", True)  # type: ignore[union-attr]
    cameras.append(Camera(10**9, 0.002))
    stream = detector.stream("0", batch=64)
    first, second = next(stream), next(stream)
    assert (second.frame or 0) > (first.frame or 0), "a live frame does not wait for a batch of 64"
    stream.close()  # type: ignore[attr-defined]
    cameras.append(Camera(4, 0.002))
    with pytest.raises(DataError, match="camera 0 was lost after 4 frames"):
        list(detector.stream(0))
