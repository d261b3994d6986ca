"""Videos of tasks: tracks in Label Studio's frames, an answer that takes several requests, and files that are none."""

from __future__ import annotations

import base64
import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from labelstudio_backend import video, video_frames
from labelstudio_backend.acquisition import by_chance
from labelstudio_backend.corrections import Correction, labelled_images
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.registry import Registry
from labelstudio_backend.scheduler import Level
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.video import NotReachedError, Videos, is_video
from moving_pictures import write_video
from real_label_studio import wait
from yolonas.errors import YolonasError
from yolonas.inference.detections import Detections
from yolonas.inference.video import Frame, Video
from yolonas.labelstudio import parse_label_config

HOST, UID, FPS, FRAMES = "http://localhost:8080", "5.1795289898", 10, 40
WIDTH, HEIGHT = 200, 100
CONFIG = """
<View><Labels name="labels" toName="video"><Label value="Car"/><Label value="Dog" {dog}/></Labels>
<Video name="video" value="$video" frameRate="25"/>
<VideoRectangle name="box" toName="video" model_score_threshold="0.5"/>{more}</View>"""


def scene(index: int) -> np.ndarray:
    """A red square that goes 4 px to the right each frame, and from frame 10 to 29 a blue one that stands still."""
    image = np.full((HEIGHT, WIDTH, 3), 20, np.uint8)
    image[20:40, 4 * index : 4 * index + 20] = (230, 20, 20)
    if 10 <= index < 30:
        image[60:90, 150:190] = (20, 20, 230)
    return image


class Colours:
    """A model that finds what is red (car) and blue (dog), with these scores."""

    names = ("car", "dog")
    checkpoint = SimpleNamespace(conf=0.25, iou=0.7)

    def __init__(self) -> None:
        self.scores = (0.9, 0.6)
        self.conf: list[float] = []
        self.images = 0

    def predict_batch(self, images: Sequence[np.ndarray], conf: float, **_: Any) -> list[Detections]:
        self.images += len(images)
        self.conf.append(conf)
        return [self.find(image) for image in images]

    def find(self, image: np.ndarray) -> Detections:
        boxes, labels = [], []
        for label, channel in enumerate((0, 2)):
            rows, columns = np.nonzero((image[..., channel] > 128) & (image[..., 2 - channel] < 128))
            if len(rows) > 20:
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        return Detections(boxes, [self.scores[label] for label in labels], labels, self.names, image.shape[:2])


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", FRAMES, scene, FPS)


def data_url(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()


class Harness:
    def __init__(self, folder: Path, **values: Any) -> None:
        values = {"weights": "yolo_nas_s_coco", "video_rate": 5.0, **values}
        self.settings = Settings(state_dir=folder, label_studio_token=None, label_studio_url="", **values)
        self.model = Colours()
        self.service = Service(
            self.settings,
            Registry(folder / "projects"),
            MediaCache(self.settings, None),
            load=lambda _: self.model,  # type: ignore[arg-type]
        )

    def predict(self, *data: dict[str, Any], dog: str = "", more: str = "") -> list[Any]:
        config = CONFIG.format(dog=dog, more=more)
        self.service.setup({"project": UID, "schema": config, "hostname": HOST})
        tasks = [{"id": 100 + index, "data": one} for index, one in enumerate(data)]
        return self.service.predict({"tasks": tasks, "project": UID, "label_config": config})["results"]


@pytest.fixture(autouse=True)
def _warnings_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)  # whatever level other tests have left


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Harness]:
    harness = Harness(tmp_path)
    yield harness
    harness.service.close()


def shown(region: dict[str, Any], number: int) -> list[float] | None:
    """Where Label Studio draws a region in its frame `number`, from 1: x, y, width, height in percent; or not."""
    keys, sequence = ("x", "y", "width", "height"), region["value"]["sequence"]
    before = [key for key in sequence if key["frame"] <= number]
    if not before or not (before[-1]["enabled"] or before[-1]["frame"] == number):
        return None
    after = next((key for key in sequence if key["frame"] > number), before[-1])
    part = (number - before[-1]["frame"]) / max(after["frame"] - before[-1]["frame"], 1)
    return [before[-1][key] + part * (after[key] - before[-1][key]) for key in keys]


def test_tracks_in_the_frames_that_label_studio_counts(harness: Harness, film: Path) -> None:
    (prediction,) = harness.predict({"video": data_url(film)})
    car, dog = prediction["result"]
    assert prediction["model_version"].endswith("-v0")
    assert (car["from_name"], car["to_name"], car["type"]) == ("box", "video", "videorectangle")
    assert (car["value"]["labels"], dog["value"]["labels"]) == (["Car"], ["Dog"])
    assert (car["value"]["framesCount"], car["value"]["duration"]) == (100, 4.0)
    assert harness.model.images == FRAMES / 2  # 5 of the 10 frames of each second
    for index in range(0, FRAMES - 1, 2):
        number = round(index / FPS * 25) + 1
        assert shown(car, number) == pytest.approx([2 * index, 20, 10, 20], abs=1.5)
    assert len(car["value"]["sequence"]) < 6  # a person corrects few keyframes
    (first, *_, last) = dog["value"]["sequence"]
    assert (first["frame"], last["frame"], last["enabled"]) == (31, 71, False)  # frames 12 and 28 at 25 a second
    assert all(0 <= key[side] <= 100 for key in car["value"]["sequence"] for side in ("x", "y", "width", "height"))


def test_a_video_goes_by_its_tracks_unless_the_order_is_by_chance(tmp_path: Path, film: Path) -> None:
    scores = {}
    for acquisition in ("random", "uncertainty", "balance"):
        harness = Harness(tmp_path, acquisition=acquisition)
        (prediction,) = harness.predict({"video": data_url(film)})
        harness.service.close()
        scores[acquisition] = prediction["score"]
    assert scores["random"] == by_chance(prediction["model_version"], 100)
    # as of an image with these two boxes
    assert scores["uncertainty"] == scores["balance"] == pytest.approx((0.9 * 0.8 + 0.6 * 0.2) / 1.5)


def test_thresholds_of_labels_decide_which_tracks_are_shown(harness: Harness, film: Path) -> None:
    (prediction,) = harness.predict({"video": data_url(film)}, dog='model_score_threshold="0.7"')
    assert [region["value"]["labels"] for region in prediction["result"]] == [["Car"]]
    assert set(harness.model.conf) == {0.1}  # faint boxes continue a track
    harness.model.scores = (0.9, 0.3)
    (prediction,) = harness.predict({"video": data_url(film)}, dog='model_score_threshold="0.05"')
    assert [region["value"]["labels"] for region in prediction["result"]] == [["Car"], ["Dog"]]
    assert harness.model.conf[-1] == 0.05


def test_a_video_beside_an_image(harness: Harness, film: Path, tmp_path: Path) -> None:
    still = tmp_path / "still.png"
    cv2.imwrite(str(still), scene(15)[..., ::-1])
    image = "data:image/png;base64," + base64.b64encode(still.read_bytes()).decode()
    more = '<Image name="i" value="$i"/><RectangleLabels name="l" toName="i"><Label value="Dog"/></RectangleLabels>'
    both, alone = harness.predict({"video": data_url(film), "i": image}, {"i": image}, more=more)
    assert sorted((region["type"], region["from_name"]) for region in both["result"]) == [
        ("rectanglelabels", "l"),
        ("videorectangle", "box"),
        ("videorectangle", "box"),
    ]
    assert alone == []  # its video is missing


def test_a_finished_video_is_not_looked_at_again(tmp_path: Path, film: Path) -> None:
    first = Harness(tmp_path)
    expected = first.predict({"video": data_url(film)})[0]["result"]
    first.service.close()
    again = Harness(tmp_path)
    found = again.predict({"video": data_url(film)})[0]["result"]
    again.service.close()
    assert again.model.images == 0
    assert [region["value"] for region in found] == [region["value"] for region in expected]


class Clock:
    """A time that passes only where a model works: one second for each frame."""

    def __init__(self) -> None:
        self.now, self.looked = 0.0, 0

    def monotonic(self) -> float:
        return self.now

    def detect(self, frames: list[Frame]) -> list[Detections | str]:
        self.now += len(frames)
        self.looked += len(frames)
        return [Colours().find(frame.image) for frame in frames]


def test_a_long_video_takes_several_requests(tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(video, "time", clock)
    settings = Settings(state_dir=tmp_path, video_rate=5)
    said = []
    for _ in range(2):
        videos = Videos(settings)  # another process, after a restart
        with pytest.raises(NotReachedError) as raised:
            videos.look(film, "v0", Colours.names, clock.detect, clock.now + 9)
        said.append(str(raised.value))
    assert "up to frame 15 of 40" in said[0]  # eight frames, each second one; eight more would be too late
    assert "up to frame 31 of 40" in said[1]
    assert "goes on from there" in said[1]
    frames = Videos(settings).look(film, "v0", Colours.names, clock.detect, clock.now + 17).frames
    assert clock.looked == FRAMES / 2  # each frame once
    assert [frame.frame for frame in frames] == list(range(0, FRAMES, 2))
    for frame in frames:
        assert frame.time == pytest.approx((frame.frame or 0) / FPS)
        assert len(frame) == (2 if 10 <= (frame.frame or 0) < 30 else 1)
    Videos(settings).look(film, "v1", Colours.names, clock.detect, clock.now + 99)
    assert clock.looked == FRAMES  # another version looks for itself


class Decoder:
    """Opens videos of which each frame takes a second of the clock to decode."""

    def __init__(self, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.grabbed, self.retrieved = clock, 0, 0
        self.on_grab: Callable[[], object] = lambda: None
        real = Video.open
        monkeypatch.setattr(Video, "open", lambda video: _Slow(self, real(video)))
        monkeypatch.setattr("labelstudio_backend.video.time", clock)


class _Slow:
    def __init__(self, decoder: Decoder, capture: Any) -> None:
        self._decoder, self._capture = decoder, capture

    def grab(self) -> bool:
        self._decoder.clock.now += 1
        self._decoder.grabbed += 1
        self._decoder.on_grab()
        return bool(self._capture.grab())

    def retrieve(self) -> Any:
        self._decoder.retrieved += 1
        return self._capture.retrieve()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._capture, name)


def until_finished(videos: Videos, film: Path, clock: Clock, seconds: float) -> int:
    """Ask for a video until it is answered, for so long each time; how often it was asked for."""
    for times in range(1, 20):
        begin = clock.now
        try:
            videos.look(film, "v0", Colours.names, clock.detect, clock.now + seconds)
            return times
        except NotReachedError:
            assert clock.now - begin <= seconds + 8, "one batch beyond the deadline, at most"
    raise AssertionError("never finished")


def test_a_video_that_takes_long_to_decode_is_gone_on_with_where_it_was_left(
    tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    decoder = Decoder(clock, monkeypatch)
    videos = Videos(Settings(state_dir=tmp_path, video_rate=5))
    assert until_finished(videos, film, clock, 12) > 2
    assert decoder.grabbed == FRAMES + 1  # each once, and the end
    assert decoder.retrieved == clock.looked == FRAMES / 2
    frames = videos.look(film, "v0", Colours.names, clock.detect, clock.now).frames
    assert [frame.frame for frame in frames] == list(range(0, FRAMES, 2))
    assert [len(frame) for frame in frames] == [2 if 10 <= index < 30 else 1 for index in range(0, FRAMES, 2)]


def test_after_a_restart_the_way_to_where_it_was_left_may_take_several_requests(
    tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    settings = Settings(state_dir=tmp_path, video_rate=5)
    with monkeypatch.context() as quick:
        quick.setattr(video, "time", clock)
        with pytest.raises(NotReachedError, match="up to frame 31 of 40"):
            Videos(settings).look(film, "v0", Colours.names, clock.detect, clock.now + 17)
    decoder = Decoder(clock, monkeypatch)
    videos, begin = Videos(settings), clock.now
    with pytest.raises(NotReachedError):
        videos.look(film, "v0", Colours.names, clock.detect, clock.now + 12)
    assert clock.now - begin <= 13  # the deadline counts on the way, too
    assert until_finished(videos, film, clock, 12) > 1
    assert (decoder.grabbed, decoder.retrieved) == (FRAMES + 1, 4)  # what is known is not converted again


def test_nobody_waits_for_a_video_any_more(tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, gone = Clock(), Future[None]()
    decoder = Decoder(clock, monkeypatch)
    decoder.on_grab = lambda: gone.set_result(None) if decoder.grabbed == 3 else None
    videos = Videos(Settings(state_dir=tmp_path, video_rate=5))
    with pytest.raises(NotReachedError):
        videos.look(film, "v0", Colours.names, clock.detect, clock.now + 1000, gone=gone)
    assert (decoder.grabbed, clock.looked) == (3, 0)


class Gate:
    """Lets detection go on batch by batch, and notes whose it was."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.open = threading.Semaphore(0)

    def of(self, name: str) -> Callable[[list[Frame]], list[Detections]]:
        def detect(frames: list[Frame]) -> list[Detections]:
            self.began.append(name)
            assert self.open.acquire(timeout=60)
            return [Colours().find(frame.image) for frame in frames]

        return detect


@pytest.fixture
def two(tmp_path: Path, film: Path) -> Iterator[tuple[Videos, Gate, Callable[..., Future[Any]]]]:
    """Videos, a gate in front of the model, and how a film is asked for by a name, in the background."""
    videos, gate = Videos(Settings(state_dir=tmp_path, video_rate=5)), Gate()

    def ask(name: str, file: Path = film, **options: Any) -> Future[Any]:
        later = time.monotonic() + 60
        return pool.submit(videos.look, file, "v0", Colours.names, gate.of(name), later, **options)

    with ThreadPoolExecutor(4) as pool:
        try:
            yield videos, gate, ask
        finally:
            gate.open.release(100)


def waiting(videos: Videos, count: int) -> None:
    wait(lambda: len(videos._turns._waiting) == count, what="those who wait for their turn")


def test_who_opens_a_video_goes_before_a_batch_action(
    two: tuple[Videos, Gate, Callable[..., Future[Any]]], film: Path, tmp_path: Path
) -> None:
    videos, gate, ask = two
    others = [Path(shutil.copy(film, tmp_path / f"{index}.mp4")) for index in range(2)]
    batch = ask("batch", level=2)
    wait(lambda: gate.began == ["batch"])
    ask("batch, later", others[0], level=2)
    waiting(videos, 1)
    opened = ask("opened", others[1], level=1)
    waiting(videos, 2)
    gate.open.release(100)
    assert len(opened.result(60).frames) == len(batch.result(60).frames) == FRAMES / 2
    wait(lambda: len(gate.began) == 9)
    assert gate.began == ["batch", *["opened"] * 3, *["batch"] * 2, *["batch, later"] * 3]


def test_a_video_that_a_batch_action_is_at_is_opened(two: tuple[Videos, Gate, Callable[..., Future[Any]]]) -> None:
    videos, gate, ask = two
    batch = ask("batch", level=2)
    wait(lambda: gate.began == ["batch"])
    opened = ask("opened", level=1)
    waiting(videos, 1)
    gate.open.release(100)
    assert [frame.frame for frame in opened.result(60).frames] == list(range(0, FRAMES, 2))
    assert len(batch.result(60).frames) == FRAMES / 2
    assert gate.began == ["batch", "opened", "opened"]  # each frame once


def test_a_request_waits_for_its_videos_as_urgently_as_it_was_made(
    harness: Harness, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []

    def look(*_: Any, level: int, gone: Future[None]) -> None:
        asked.append((level, gone.done()))
        raise NotReachedError("its video waits")

    monkeypatch.setattr(harness.service.videos, "look", look)
    data = {"video": data_url(film)}
    harness.predict(data)
    harness.predict(data, data)
    assert asked == [(Level.OPENED, False), (Level.MANY, False), (Level.MANY, False)]


def test_who_leaves_does_not_wait_for_a_turn(two: tuple[Videos, Gate, Callable[..., Future[Any]]]) -> None:
    videos, gate, ask = two
    gone: Future[None] = Future()
    ask("first")
    wait(lambda: gate.began == ["first"])
    leaving = ask("leaving", gone=gone)
    waiting(videos, 1)
    gone.set_result(None)
    with pytest.raises(NotReachedError, match="waits for another one"):
        leaving.result(30)
    gate.open.release(1)
    wait(lambda: gate.began == ["first", "first"])


def test_a_finished_video_is_answered_while_another_one_is_looked_at(
    two: tuple[Videos, Gate, Callable[..., Future[Any]]], film: Path, tmp_path: Path
) -> None:
    _, gate, ask = two
    gate.open.release(3)
    ask("finished").result(60)
    ask("other", Path(shutil.copy(film, tmp_path / "other.mp4")))
    wait(lambda: gate.began[-1] == "other")
    assert len(ask("again").result(30).frames) == FRAMES / 2


def test_a_video_that_is_fetched_slowly_is_there_for_a_later_request(
    tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own time-out may end after the request's: Label Studio would have given up by then."""
    harness = Harness(tmp_path, predict_seconds=2.0)
    arrived, asked = threading.Event(), list[str]()

    def slow(value: str, **_: Any) -> Path:
        asked.append(value)
        assert arrived.wait(60)
        return film

    monkeypatch.setattr(harness.service.media, "fetch", slow)
    task = {"video": "/data/upload/1/film.mp4"}
    assert harness.predict(task) == [[]]
    assert "its video is still being fetched" in caplog.text
    arrived.set()
    wait(lambda: bool(harness.predict(task)[0]), what="tracks")
    assert len(asked) <= 2, "one download for all who wait"
    harness.service.close()


def test_of_many_long_videos_in_turns_each_is_finished(
    tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    Decoder(clock, monkeypatch)
    films = [Path(shutil.copy(film, tmp_path / f"{name}.mp4")) for name in "abc"]
    videos, rounds = Videos(Settings(state_dir=tmp_path, video_rate=5)), 0
    while films:
        assert (rounds := rounds + 1) < 20, "decoded from the beginning each time, they never are"
        for one in list(films):
            with contextlib.suppress(NotReachedError):
                videos.look(one, "v0", Colours.names, clock.detect, clock.now + 12, level=Level.MANY)
                films.remove(one)


def test_a_damaged_file_of_findings_costs_only_time(
    tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, videos = Clock(), Videos(Settings(state_dir=tmp_path, video_rate=5))
    later = time.monotonic() + 1000
    expected = videos.look(film, "v0", Colours.names, clock.detect, later)
    (kept,) = videos.folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:200])
    found = videos.look(film, "v0", Colours.names, clock.detect, later)
    assert "is damaged" in caplog.text
    assert [len(frame) for frame in found.frames] == [len(frame) for frame in expected.frames]
    assert clock.looked == FRAMES


def test_what_was_found_longest_ago_is_dropped(tmp_path: Path, film: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "KEPT", 2)
    videos = Videos(Settings(state_dir=tmp_path, video_rate=1))
    for version in ("v0", "v1", "v2"):
        videos.look(film, version, Colours.names, Clock().detect, time.monotonic() + 1000)
    assert len(list(videos.folder.iterdir())) == 2


def test_a_frame_that_fails_keeps_what_was_found_before(tmp_path: Path, film: Path) -> None:
    clock, videos = Clock(), Videos(Settings(state_dir=tmp_path, video_rate=5))

    def fail(frames: list[Frame]) -> list[Detections | str]:
        return [*clock.detect(frames)[:2], *["out of memory"] * (len(frames) - 2)]

    with pytest.raises(MediaError, match="frame 4 of its video: out of memory"):
        videos.look(film, "v0", Colours.names, fail, time.monotonic() + 1000)
    clock.looked = 0
    videos.look(film, "v0", Colours.names, clock.detect, time.monotonic() + 1000)
    assert clock.looked == FRAMES / 2 - 2


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<html></html>",
        b"",
        b"\x00\x00\x00\x18ftypmp42" + bytes(200),  # begins as a video, and holds none
    ],
)
def test_what_is_no_video_is_one_sentence(harness: Harness, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(content).decode()
    assert harness.predict({"video": url}) == [[]]
    (line,) = [record.getMessage() for record in caplog.records if "no prediction for task" in record.getMessage()]
    assert "video" in line
    assert "Traceback" not in caplog.text


def test_a_playlist_is_never_given_to_ffmpeg(tmp_path: Path) -> None:
    file = tmp_path / "list.mp4"
    file.write_text("#EXTM3U\n")
    assert not is_video(file)
    with pytest.raises(MediaError, match="no format that a browser plays"):
        Videos(Settings(state_dir=tmp_path)).look(file, "v0", (), Clock().detect, time.monotonic() + 9)


def test_a_video_that_breaks_off_is_predicted_as_far_as_it_goes(
    harness: Harness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = write_video(tmp_path / "whole.avi", FRAMES, scene, FPS)
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    caplog.set_level(logging.WARNING)
    (prediction,) = harness.predict({"video": data_url(cut)})
    assert {region["value"]["labels"][0] for region in prediction["result"]} == {"Car", "Dog"}
    assert "truncated or damaged" in caplog.text


def test_a_video_has_a_size_limit_of_its_own(tmp_path: Path, film: Path, caplog: pytest.LogCaptureFixture) -> None:
    harness = Harness(tmp_path, media_max_bytes=10, video_max_bytes=film.stat().st_size)
    assert harness.predict({"video": data_url(film)})[0]["result"]
    harness.service.close()
    harness = Harness(tmp_path / "other", video_max_bytes=film.stat().st_size - 1)
    assert harness.predict({"video": data_url(film)}) == [[]]
    assert "raise YOLONAS_VIDEO_MAX_BYTES" in caplog.text
    harness.service.close()


# -- videos that people have labelled


def learnt(folder: Path, film: Path, result: list[dict[str, Any]]) -> Any:
    def no_image(value: str, task: int) -> Path:
        raise YolonasError("there is no image")

    found = [Correction(7, {"video": "/data/upload/1/film.mp4"}, {"id": 1, "result": result})]
    controls = parse_label_config(CONFIG.format(dog="", more=""))
    return labelled_images(found, controls, no_image, folder, fetch_video=lambda value, task: film)


def test_keyframes_become_images_with_what_is_shown_there(harness: Harness, film: Path, tmp_path: Path) -> None:
    (prediction,) = harness.predict({"video": data_url(film)})
    data = learnt(tmp_path / "images", film, prediction["result"])
    assert data.names == ("Car", "Dog")
    assert len(data) >= 4
    assert [image.image_id for image in data.images] == list(range(1, len(data) + 1))
    for image in data.images:
        picture = cv2.imread(str(image.path))[..., ::-1]
        expected = Colours().find(picture)  # what the film shows in this very frame
        np.testing.assert_allclose(image.boxes, expected.boxes, atol=3)
        assert image.labels.tolist() == expected.labels.tolist()
    assert {int(label) for image in data.images for label in image.labels} == {0, 1}


def test_of_a_long_video_some_keyframes_are_learnt(
    harness: Harness, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prediction,) = harness.predict({"video": data_url(film)})
    monkeypatch.setattr(video_frames, "MOST_FRAMES", 2)
    data = learnt(tmp_path / "images", film, prediction["result"])
    indices = sorted(int(image.path.stem.rpartition("-")[2]) for image in data.images)
    assert indices == [0, 38]  # the first and the last


def test_frames_are_written_once(harness: Harness, film: Path, tmp_path: Path) -> None:
    (prediction,) = harness.predict({"video": data_url(film)})
    first = learnt(tmp_path / "images", film, prediction["result"])
    times = {image.path: image.path.stat().st_mtime_ns for image in first.images}
    again = learnt(tmp_path / "images", film, prediction["result"])
    assert {image.path: image.path.stat().st_mtime_ns for image in again.images} == times


def test_videos_that_teach_nothing(film: Path, tmp_path: Path) -> None:
    assert len(learnt(tmp_path, film, [])) == 0
    key = {"frame": 1, "enabled": True, "x": 1, "y": 1, "width": 50, "height": 50}
    region = {"type": "videorectangle", "from_name": "box", "to_name": "video"}
    result = [{**region, "value": {"sequence": [key], "labels": ["Car"]}}]
    assert len(learnt(tmp_path, film, result)) == 1
    (tmp_path / "text").write_text("#EXTM3U")
    data = learnt(tmp_path / "other", tmp_path / "text", result)
    assert data.dropped == ["task 7: its video is in no format that a browser plays; use MP4 (H.264) or WebM"]
    found = [Correction(7, {"video": "/a.mp4"}, {"id": 1, "result": result})]
    without = labelled_images(found, parse_label_config(CONFIG.format(dog="", more="")), learnt, tmp_path)
    assert len(without) == 0


@pytest.mark.parametrize(("number", "index"), [(1, 0), (4, 1), (26, 10), (1000, FRAMES - 1)])
def test_a_keyframe_is_the_frame_that_label_studio_shows(number: int, index: int, film: Path, tmp_path: Path) -> None:
    """It shows its frame n at (n - 1) / 25 s, by the rate in the label config."""
    key = {"frame": number, "enabled": True, "x": 1, "y": 1, "width": 50, "height": 50}
    region = {"type": "videorectangle", "from_name": "box", "to_name": "video"}
    (image,) = learnt(tmp_path, film, [{**region, "value": {"sequence": [key], "labels": ["Car"]}}]).images
    assert image.path.name == f"7-v0-{index}.jpg"
