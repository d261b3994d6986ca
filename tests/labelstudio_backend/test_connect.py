"""What `connect` makes and repairs, against a fake Label Studio; test_connection.py has the real one."""

from __future__ import annotations

import base64
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from labelstudio_backend import client as client_module
from labelstudio_backend import label_studio_http
from labelstudio_backend.backend import Credentials, same_address
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.connect import MARK, SAMPLING, ConnectError, connect_project
from labelstudio_backend.label_studio_http import LabelStudioError
from studio_transport import BACKEND, TOKEN, URL, VERSION, FakeBackend, FakeStudio

SECRET = "correct-horse-battery"
BASIC = "Basic " + base64.b64encode(b"ann:staple-battery").decode()
OLD = "http://old.example.org:9090"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio_http, "RETRY_SECONDS", 0.0)


@pytest.fixture
def studio() -> FakeStudio:
    return FakeStudio()


@pytest.fixture
def client(studio: FakeStudio) -> Iterator[LabelStudio]:
    with LabelStudio(URL, TOKEN, transport=studio) as client:
        yield client


Connect = Callable[..., list[str]]


@pytest.fixture
def connect(studio: FakeStudio, client: LabelStudio) -> Connect:
    def run(url: str = BACKEND, credentials: Credentials | None = None, **options: Any) -> list[str]:
        lines: list[str] = []
        found = connect_project(client, 5, url, credentials, say=lines.append, transport=studio, **options)
        assert lines == found.changes or options.get("dry_run")
        return lines

    return run


def in_order(studio: FakeStudio, url: str = BACKEND) -> None:
    (row,) = studio.rows
    assert (row["url"], row["title"], row["state"]) == (url, VERSION, "CO")
    (webhook,) = studio.webhooks
    assert webhook["url"] == f"{url}/webhook"
    assert webhook["send_payload"]
    assert webhook["send_for_all_actions"]
    assert webhook["is_active"]
    assert MARK in webhook["headers"]
    assert studio.project["model_version"] == VERSION
    assert studio.project["sampling"] == SAMPLING
    assert studio.project["show_collab_predictions"] is True


def test_a_fresh_project_is_connected_and_a_second_run_changes_nothing(studio: FakeStudio, connect: Connect) -> None:
    lines = connect()
    in_order(studio)
    assert lines[0] == f"backend {BACKEND} added to the project"
    assert any(f"title 'yolonas' -> '{VERSION}'" in line for line in lines)
    assert any("sampling 'Sequential sampling' -> 'Uncertainty sampling'" in line for line in lines)
    before = copy.deepcopy((studio.rows, studio.webhooks, studio.project))
    calls = studio.calls.copy()
    assert connect() == []
    assert (studio.rows, studio.webhooks, studio.project) == before
    assert not {name for name in (studio.calls - calls) if not name.startswith("GET ")}, "nothing is written"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda s: s.webhooks.clear(), "webhook http://backend.example.org:9090/webhook added"),
        (lambda s: s.webhooks[0].update(is_active=False), "is_active set"),
        (lambda s: s.webhooks[0].update(send_payload=False), "send_payload set"),
        (lambda s: s.webhooks[0].update(send_for_all_actions=False), "send_for_all_actions set"),
        (lambda s: s.add_webhook(f"{BACKEND}/webhook"), "removed: it is there twice"),
        (lambda s: s.rows[0].update(title="My model"), "title 'My model' -> "),
        (lambda s: s.rows[0].update(auto_update=False), "follows the versions"),
        (lambda s: s.project.update(model_version="other"), "model_version 'other' -> "),
        (lambda s: s.project.update(show_collab_predictions=False), "show_collab_predictions False -> True"),
        (lambda s: s.add_row(BACKEND + "/"), "removed: it is the same as backend"),
    ],
)
def test_each_thing_that_is_wrong_is_repaired_and_named(
    studio: FakeStudio, connect: Connect, spoil: Callable[[FakeStudio], None], line: str
) -> None:
    connect()
    spoil(studio)
    dry = connect(dry_run=True)
    lines = connect()
    assert len(lines) == 1
    assert line in lines[0]
    assert dry == [f"would do: {lines[0]}"]
    in_order(studio)
    assert connect() == []


def test_a_dry_run_changes_nothing(studio: FakeStudio, connect: Connect) -> None:
    lines = connect(dry_run=True)
    assert len(lines) == 2
    assert all(line.startswith("would do: ") for line in lines)
    assert not [name for name in studio.calls if not name.startswith("GET ")]


def test_the_order_of_the_stream_is_left_alone_when_asked(studio: FakeStudio, connect: Connect) -> None:
    connect(sampling=False)
    assert studio.project["sampling"] == "Sequential sampling"


# -- rows of one backend, and others' -------------------------------------------------------------------------------


def test_a_backend_that_has_moved_keeps_its_row(studio: FakeStudio, connect: Connect) -> None:
    studio.backends[OLD] = studio.backends[BACKEND]
    connect(OLD)
    number = studio.rows[0]["id"]
    del studio.backends[OLD]
    lines = connect()
    assert f"backend {number}: address {OLD} -> {BACKEND}" in lines
    assert any("removed: its backend is gone" in line for line in lines)
    assert studio.rows[0]["id"] == number
    in_order(studio)


def test_a_dead_twin_at_another_address_is_folded_into_one_row(studio: FakeStudio, connect: Connect) -> None:
    connect()
    studio.rows.insert(0, studio.add_row(OLD, VERSION) and studio.rows.pop())
    studio.add_webhook(f"{OLD}/webhook")
    connect()
    in_order(studio)
    assert connect() == []


def test_backends_and_webhooks_of_other_people_stay(studio: FakeStudio, connect: Connect) -> None:
    studio.backends["http://sam.example.org"] = FakeBackend("sam-1", name="segment anything")
    studio.backends["http://second.example.org"] = FakeBackend()
    studio.backends["http://relay.example.org"] = FakeBackend(name="relay")
    for url in ("http://sam.example.org", "http://second.example.org", "http://gone.example.org"):
        studio.add_row(url, "theirs")
        studio.add_webhook(f"{url}/webhook")
    studio.add_webhook("http://relay.example.org/webhook")  # something answers, which is not ours
    studio.add_webhook("http://chat.example.org/webhook")  # nobody answers
    studio.add_webhook("http://chat.example.org/webhook/abc", headers={MARK: "backend"})  # not of a backend
    rows, webhooks = copy.deepcopy(studio.rows), copy.deepcopy(studio.webhooks)
    connect()
    assert [row for row in studio.rows if row["url"] != BACKEND] == rows
    assert [w for w in studio.webhooks if w["url"] != f"{BACKEND}/webhook"] == webhooks


def test_webhooks_of_deleted_backends_of_ours_go(studio: FakeStudio, connect: Connect) -> None:
    studio.add_webhook("http://dead.example.org/webhook", headers={MARK: "backend"})  # once connected by us
    studio.backends["http://alive.example.org"] = FakeBackend()
    studio.add_webhook("http://alive.example.org/webhook")  # by hand, but a yolonas backend answers there
    lines = connect()
    assert sum("its backend is gone" in line for line in lines) == 2
    in_order(studio)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://localhost:9090", "http://127.0.0.1:9090/", True),
        ("http://Host.example.org", "http://host.example.org:80", True),
        ("https://host", "https://host:443/", True),
        ("http://host:9090", "http://host:9091", False),
        ("http://host/a", "http://host/b", False),
        ("http://host", "https://host", False),
    ],
)
def test_addresses_are_compared_by_what_they_name(one: str, other: str, same: bool) -> None:
    assert same_address(one, other) is same


# -- passwords ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credentials", "header", "row_header"),
    [
        (Credentials("ann", "staple-battery"), BASIC, BASIC),
        (
            Credentials(secret=SECRET),
            f"Bearer {SECRET}",
            "Basic " + base64.b64encode(f"yolonas:{SECRET}".encode()).decode(),
        ),
        (Credentials("ann", "staple-battery", SECRET), f"Bearer {SECRET}", BASIC),
    ],
)
def test_the_password_goes_into_the_row_and_the_webhook(
    studio: FakeStudio, connect: Connect, credentials: Credentials, header: str, row_header: str
) -> None:
    connect()  # while it was open
    studio.backend().header = row_header
    lines = connect(credentials=credentials)
    assert studio.webhooks[0]["headers"]["Authorization"] == header
    assert studio.rows[0]["state"] == "CO"
    in_order(studio)
    assert any("header Authorization set" in line for line in lines)
    assert not any(word in line for line in lines for word in (SECRET, "staple", header))
    assert "staple" not in repr(credentials)
    assert connect(credentials=credentials) == []


def test_a_new_password_replaces_the_old_one(studio: FakeStudio, connect: Connect) -> None:
    studio.backend().header = BASIC
    connect(credentials=Credentials("ann", "staple-battery"))
    studio.backend().header = "Basic " + base64.b64encode(b"ann:another-one").decode()
    lines = connect(credentials=Credentials("ann", "another-one"))
    assert [line.partition(": ")[2] for line in lines if line.startswith("backend")] == ["user 'ann' and password set"]
    in_order(studio)
    assert connect(credentials=Credentials("ann", "another-one")) == []


def test_a_password_that_is_missing_or_wrong_is_one_sentence(studio: FakeStudio, connect: Connect) -> None:
    studio.backend().header = BASIC
    for credentials in (None, Credentials("ann", "wrong-password")):
        with pytest.raises(ConnectError, match="asks for a password: set YOLONAS_BASIC_AUTH_USER") as raised:
            connect(credentials=credentials)
        assert "wrong-password" not in str(raised.value)
    assert not studio.rows


# -- what stands in the way -----------------------------------------------------------------------------------------


def test_a_backend_that_label_studio_does_not_reach(connect: Connect) -> None:
    with pytest.raises(ConnectError, match=r"does not reach the backend at http://nowhere:1 \(Connection refused\)"):
        connect("http://nowhere:1")


def test_a_connected_backend_that_is_down(studio: FakeStudio, connect: Connect) -> None:
    connect()
    del studio.backends[BACKEND]
    with pytest.raises(ConnectError, match="does not reach the backend"):
        connect()


def test_a_backend_that_does_not_work(studio: FakeStudio, connect: Connect) -> None:
    studio.backend().works = False
    with pytest.raises(ConnectError, match=r"is no backend that works: 503 Client Error.*look into its log"):
        connect()


def test_private_addresses_refused_by_label_studio(studio: FakeStudio, connect: Connect) -> None:
    studio.reserved = True
    with pytest.raises(ConnectError, match="start Label Studio with USE_DEFAULT_BANNED_SUBNETS=false"):
        connect()


def test_a_webhook_refused_by_label_studio_is_said_and_the_rest_done(
    studio: FakeStudio, client: LabelStudio, connect: Connect
) -> None:
    connect()
    studio.webhooks.clear()
    studio.project["sampling"] = "Uniform sampling"
    studio.refused = "POST api/webhooks"
    found = connect_project(client, 5, BACKEND, transport=studio)
    assert len(found.changes) == 1
    assert "sampling" in found.changes[0]
    (sentence,) = found.refused
    assert sentence.startswith(f"refused by Label Studio: webhook {BACKEND}/webhook added; the token")


def test_a_project_that_is_not_there_and_a_refused_token(studio: FakeStudio, client: LabelStudio) -> None:
    with pytest.raises(LabelStudioError, match="check YOLONAS_LABEL_STUDIO_URL and that the project still exists"):
        connect_project(client, 6, BACKEND)
    with LabelStudio(URL, "f" * 40, transport=studio) as other, pytest.raises(LabelStudioError, match="was refused"):
        connect_project(other, 5, BACKEND)
    assert not [name for name in studio.calls if not name.startswith("GET ")]


def test_a_title_that_a_running_training_saves_over_is_set_again(studio: FakeStudio, client: LabelStudio) -> None:
    row = studio.add_row(BACKEND)
    lost = iter([True, False])

    def pause(seconds: float) -> None:
        if next(lost):
            row["title"] = "My model"  # Label Studio saves what it held

    assert client.retitle_ml_backend(dict(row), VERSION, pause)["title"] == VERSION


def test_a_title_that_stays_is_one_sentence(
    studio: FakeStudio, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio.add_row(BACKEND)
    monkeypatch.setattr(client_module, "TITLE_TRIES", 1)
    monkeypatch.setattr(studio, "_save", lambda row, body: row)
    with pytest.raises(ConnectError, match=r"stays 'My model'.*connect again"):
        connect()


# -- the command ----------------------------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, studio: FakeStudio, *arguments: str) -> Result:
    real = LabelStudio.__init__

    def with_fake(self: LabelStudio, *args: Any, **options: Any) -> None:
        real(self, *args, **{**options, "transport": studio})

    monkeypatch.setattr(LabelStudio, "__init__", with_fake)
    monkeypatch.setenv("YOLONAS_LABEL_STUDIO_URL", URL)
    return CliRunner().invoke(main, ["connect", "--project", "5", "--token", TOKEN, *arguments])


def test_the_command_says_line_by_line_what_it_did(
    monkeypatch: pytest.MonkeyPatch, studio: FakeStudio, tmp_path: Path
) -> None:
    result = run(monkeypatch, studio)
    assert result.exit_code == 2
    assert "give --url" in result.output
    result = run(monkeypatch, studio, "--url", BACKEND, "--keep-sampling")
    assert result.exit_code == 0, result.output
    assert f"backend {BACKEND} added to the project\n" in result.output
    assert TOKEN not in result.output
    assert studio.project["sampling"] == "Sequential sampling"
    result = run(monkeypatch, studio, "--keep-sampling")
    assert (result.exit_code, result.output) == (0, "Nothing to change.\n"), "the address is that of the backend there"
    studio.refused = "PATCH api/projects"
    result = run(monkeypatch, studio)
    assert result.exit_code == 1
    assert result.output.startswith("Error: refused by Label Studio: project 5: sampling")
    assert "Nothing to change" not in result.output


@pytest.mark.parametrize(
    ("url", "sentence"), [("localhost:9090", "needs its scheme"), ("http://ann:pw@host", "a login does not belong")]
)
def test_an_address_that_cannot_be_one(
    monkeypatch: pytest.MonkeyPatch, studio: FakeStudio, url: str, sentence: str
) -> None:
    result = run(monkeypatch, studio, "--url", url)
    assert result.exit_code == 2
    assert sentence in result.output
