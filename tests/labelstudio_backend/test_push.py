"""`push`: every task predicted once, whatever happens on the way, against a fake Label Studio and backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from labelstudio_backend import label_studio_http
from labelstudio_backend.backend import Backend
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.push import LARGEST_CHUNK, Pushed, PushError, push_project
from studio_transport import BACKEND, TOKEN, URL, VERSION, FakeStudio

NEWER = "yolonas-5-abc123-v1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)


@pytest.fixture
def studio() -> FakeStudio:
    studio = FakeStudio(tasks=300)
    studio.add_row(BACKEND, VERSION)
    return studio


@pytest.fixture
def push(studio: FakeStudio) -> Iterator[Callable[..., Pushed]]:
    client = LabelStudio(URL, TOKEN, transport=studio)
    backend = Backend(BACKEND, transport=studio)

    def run(**options: Any) -> Pushed:
        return push_project(client, backend, 5, VERSION, **{"pause": lambda seconds: None, **options})

    yield run
    client.close()
    backend.close()


def test_two_thousand_tasks_in_chunks_and_nothing_the_second_time(push: Callable[..., Pushed]) -> None:
    studio = FakeStudio(tasks=2000)
    seen: list[tuple[int, int]] = []
    sizes: list[int] = []
    studio.backend().before = lambda tasks: sizes.append(len(tasks))
    with LabelStudio(URL, TOKEN, transport=studio) as client, Backend(BACKEND, transport=studio) as backend:
        begun = time.monotonic()
        pushed = push_project(client, backend, 5, VERSION, lambda done, total, note: seen.append((done, total)))
        print(f"2,000 tasks: {time.monotonic() - begun:.1f} s, {len(sizes)} requests to the backend")
        assert (pushed.version, pushed.tasks, pushed.stored, pushed.left) == (VERSION, 2000, 2000, [])
        assert studio.of_version() == list(range(1, 2001))
        assert sizes[0] < max(sizes) <= LARGEST_CHUNK, "it starts with a small chunk"
        assert seen[0] == (0, 2000)
        assert seen[-1] == (2000, 2000)
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert studio.calls["POST api/projects/ID/import/predictions"] <= 11, "many at once"
        asked = len(studio.backend().predicted)
        assert push_project(client, backend, 5, VERSION).stored == 0
        assert len(studio.backend().predicted) == asked


def test_predictions_are_stored_as_the_backend_gave_them(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    push()
    stored = studio.predictions[0]
    assert {key: stored[key] for key in ("task", "result", "score", "model_version")} == {
        "task": 1,
        "result": [{"id": "r"}],
        "score": 0.5,
        "model_version": VERSION,
    }


def test_ctrl_c_stores_what_was_predicted_and_the_next_run_goes_on(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    backend = studio.backend()

    def interrupt(tasks: list[int]) -> None:
        if len(backend.predicted) > 50:
            raise KeyboardInterrupt

    backend.before = interrupt
    pushed = push()
    assert pushed.interrupted
    assert pushed.stored == len(backend.predicted) > 50
    assert studio.of_version() == sorted(backend.predicted)
    backend.before = lambda tasks: None
    pushed = push()
    assert (pushed.interrupted, pushed.left) == (False, [])
    assert studio.of_version() == list(range(1, 301))
    assert sorted(backend.predicted) == list(range(1, 301)), "nothing was predicted twice"


@pytest.mark.parametrize("who", ["studio", "backend"])
def test_either_may_be_away_for_a_moment(studio: FakeStudio, push: Callable[..., Pushed], who: str) -> None:
    notes: list[str] = []
    waited: list[float] = []
    away = iter([40])

    def go(tasks: list[int]) -> None:
        if len(studio.backend().predicted) > 50 and (calls := next(away, None)):
            (studio if who == "studio" else studio.backend()).away = calls

    studio.backend().before = go
    pushed = push(show=lambda done, total, note: notes.append(note), pause=waited.append)
    assert pushed.left == []
    assert studio.of_version() == list(range(1, 301))
    assert f"waiting for {'Label Studio' if who == 'studio' else 'the backend'}" in notes
    assert waited == sorted(waited)
    assert max(waited) <= 15


def test_who_stays_away_is_named(
    studio: FakeStudio, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pause(seconds: float) -> None:
        now[0] += seconds

    studio.backend().away = 10**9
    with pytest.raises(PushError, match=r"no answer from the backend at http://backend.example.org:9090 .*check that"):
        push(pause=pause)
    studio.backend().away, studio.away = 0, 10**9
    with pytest.raises(LabelStudioError, match="no answer from Label Studio"):
        push(pause=pause)


def test_an_import_whose_answer_is_lost_is_not_made_twice(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    studio.lose = 1
    pushed = push()
    assert pushed.left == []
    assert studio.of_version() == list(range(1, 301))
    assert studio.calls["DELETE api/predictions/ID"] == 0, "not made, rather than mended"


def test_an_import_that_fails_for_a_moment_is_tried_again_after_a_pause(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    notes: list[str] = []
    waited: list[float] = []
    studio.overloaded = 6
    pushed = push(show=lambda done, total, note: notes.append(note), pause=waited.append)
    assert pushed.left == []
    assert studio.of_version() == list(range(1, 301))
    assert waited == [1, 2, 4, 8, 15, 15]
    assert notes.count("waiting for Label Studio") == 6


def test_imports_that_go_on_failing_are_given_up(
    studio: FakeStudio, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = [time.monotonic()], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def pause(seconds: float) -> None:
        now[0] += seconds
        waited.append(seconds)
        assert len(waited) < 1000

    studio.overloaded = 10**9
    with pytest.raises(LabelStudioError, match=r"import/predictions answered 504"):
        push(pause=pause)
    assert 300 <= sum(waited) < 330


def test_an_import_that_ended_late_leaves_no_doubles(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    late = [{"id": 10**6 + task, "task": task, "result": [], "score": 1, "model_version": VERSION} for task in (7, 8)]

    def pause_then_show(done: int, total: int, note: str) -> None:
        if done == total:
            studio.predictions.extend(late)
            late.clear()

    push(show=pause_then_show)
    assert studio.of_version() == list(range(1, 301))
    assert max(p["id"] for p in studio.predictions) < 10**6, "the first of two stays"


def test_a_task_that_somebody_opens_meanwhile_keeps_that_prediction(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    theirs = {"id": 10**6, "task": 20, "result": [], "score": 1.0, "model_version": VERSION}
    studio.backend().before = lambda tasks: studio.predictions.append(theirs) if 20 in tasks else None
    push()
    assert studio.of_version() == list(range(1, 301))
    assert theirs in studio.predictions


def test_a_task_that_is_deleted_meanwhile_does_not_stop_the_others(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    studio.backend().before = lambda tasks: studio.tasks.pop(30, None) and None
    pushed = push()
    assert pushed.left == []
    assert studio.of_version() == [task for task in range(1, 301) if task != 30]


def test_a_refused_import_is_said(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    studio.refused = "POST .*import"
    with pytest.raises(LabelStudioError, match="answered 403; the token's user may not do this"):
        push()


def test_a_training_that_ends_meanwhile_has_everything_predicted_with_the_new_version(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    backend = studio.backend()

    def publish(tasks: list[int]) -> None:
        if len(backend.predicted) > 100:
            backend.version = NEWER

    backend.before = publish
    pushed = push()
    assert (pushed.version, pushed.left) == (NEWER, [])
    assert studio.of_version(NEWER) == list(range(1, 301))
    assert len(studio.of_version()) > 100, "what was predicted before is kept"


def test_a_version_whose_name_begins_another_name(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    studio.backend().version = "yolonas-5-abc123-v1"
    studio.predictions = [
        {"id": task, "task": task, "result": [], "score": 0, "model_version": "yolonas-5-abc123-v10"}
        for task in range(1, 301)
    ]
    pushed = push()
    assert (pushed.version, pushed.stored, pushed.left) == (NEWER, 300, [])
    assert studio.of_version(NEWER) == list(range(1, 301))


def test_a_task_without_a_prediction_is_asked_twice_and_named(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    asked: list[int] = []
    studio.backend().silent = {3, 290}
    studio.backend().before = asked.extend
    pushed = push()
    assert pushed.left == [3, 290]
    assert asked.count(3) == asked.count(290) == 2
    assert asked.count(4) == 1
    assert len(studio.of_version()) == 298


def test_a_backend_that_predicts_nothing_is_not_asked_for_everything(
    studio: FakeStudio, push: Callable[..., Pushed]
) -> None:
    studio.backend().silent = set(range(1, 301))
    with pytest.raises(PushError, match=r"without any prediction.*doctor"):
        push()
    assert len(studio.backend().predicted) < 100


def test_a_request_that_is_too_large_is_made_smaller(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    studio.backend().most = 20
    assert push().left == []
    assert studio.of_version() == list(range(1, 301))


def test_a_slow_backend_gets_small_chunks(
    studio: FakeStudio, push: Callable[..., Pushed], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, sizes = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def slow(tasks: list[int]) -> None:
        sizes.append(len(tasks))
        now[0] += 2.0 * len(tasks)

    studio.backend().before = slow
    assert push().left == []
    assert max(sizes[1:]) * 2.0 <= 15.0


def test_a_backend_with_another_password(studio: FakeStudio, push: Callable[..., Pushed]) -> None:
    studio.backend().header = "Bearer correct-horse-battery"
    with pytest.raises(PushError, match="asks for a password: set YOLONAS_BASIC_AUTH_USER"):
        push()


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(studio: FakeStudio, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    real = httpx.Client.__init__

    def with_fake(self: httpx.Client, *args: Any, **options: Any) -> None:
        real(self, *args, **({**options, "transport": studio} if options.get("transport") is None else options))

    monkeypatch.setattr(httpx.Client, "__init__", with_fake)
    options = ["--project", "5", "--label-studio-url", URL, "--token", TOKEN]
    return lambda *more: CliRunner().invoke(main, ["push", *options, *more])


def test_the_command(studio: FakeStudio, command: Callable[..., Any]) -> None:
    result = command()
    assert result.exit_code == 0, result.output
    assert result.output == f"300 of 300 tasks have a prediction of {VERSION}, 300 of them made now.\n"
    studio.tasks[301] = {"id": 301, "data": {"image": "/data/upload/5/301.jpg"}}
    studio.backend().silent = {301}
    result = command()
    assert result.exit_code == 1
    assert "300 of 301 tasks have a prediction" in result.output
    assert "Without: 301. The log of the backend says why" in result.output


def test_the_command_without_a_connection(studio: FakeStudio, command: Callable[..., Any]) -> None:
    studio.backends["http://backend.lan"] = studio.backends.pop(BACKEND)
    result = command("--url", "http://backend.lan")
    assert result.exit_code == 1
    assert f"Label Studio does not reach the backend at {BACKEND}" in result.output
    studio.rows.clear()
    result = command()
    assert result.exit_code == 1
    assert "run `yolonas-labelstudio connect` first" in result.output
