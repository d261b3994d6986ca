from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import httpx
import pytest
from click.testing import CliRunner

from labelstudio_backend import local_label_studio
from labelstudio_backend import up as up_module
from labelstudio_backend.cli import main
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.local_label_studio import Account, Process, free_port
from labelstudio_backend.registry import Registry
from labelstudio_backend.sample_project import TITLE
from labelstudio_backend.up import LABELLED_IMAGES, SAMPLE_IMAGES
from real_label_studio import wait
from yolonas.errors import YolonasError

STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"
)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- a Label Studio of our own -------------------------------------------------------------------------------------


def test_two_who_ask_at_once_install_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs: list[list[str]] = []

    def pip(command: list[str], log: Path, on_line: Callable[[str], None]) -> None:
        runs.append(command)
        time.sleep(0.3)
        program = local_label_studio.environment_dir() / "bin" / "label-studio"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.touch()

    monkeypatch.setattr(local_label_studio, "_run_logged", pip)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(local_label_studio.install())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 2, "one venv, one pip install"
    assert found == [tmp_path / "yolonas" / "label-studio-1.23.2" / "bin" / "label-studio"] * 2


def test_an_installation_that_was_cut_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = local_label_studio.environment_dir() / "bin" / "label-studio"
    program.parent.mkdir(parents=True)
    program.touch()  # pip puts the program there before it has installed everything
    runs: list[list[str]] = []
    monkeypatch.setattr(local_label_studio, "_run_logged", lambda command, *_: runs.append(command))
    local_label_studio.install()
    local_label_studio.install()
    assert len(runs) == 2


def test_a_failing_pip_is_one_sentence_that_names_the_log(tmp_path: Path) -> None:
    with pytest.raises(YolonasError, match=r"could not be installed .*see .*pip\.log"):
        local_label_studio._run_logged([sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "pip.log", print)


def test_the_account_is_kept_and_private(tmp_path: Path) -> None:
    account = Account.of(tmp_path)
    assert Account.of(tmp_path) == account
    assert re.fullmatch("[0-9a-f]{40}", account.token)
    assert (tmp_path / "account.json").stat().st_mode & 0o077 == 0


def test_a_port_that_is_taken_is_not_given() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port(port) != port
    assert free_port(port) == port


def test_stop_ends_a_process_that_will_not_and_what_it_started(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys; c = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n"
        "print(c.pid, flush=True); c.wait()"
    )
    process = Process("it", [sys.executable, "-c", code], dict(os.environ), tmp_path / "log")
    process.wait_until(lambda: "ready" in process.log.read_text(), 60)
    child = int(process.log.read_text().split()[0])
    assert alive(child)
    process.stop(0.5)
    assert not process.running
    wait(lambda: not alive(child))


def test_a_process_that_ends_while_starting_is_quoted(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no database')"]
    process = Process("it", command, dict(os.environ), tmp_path / "log")
    with pytest.raises(YolonasError, match=r"it ended while starting \(exit code 1\): no database \(log: "):
        process.wait_until(lambda: False, 60)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_process_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\nfrom pathlib import Path\nfrom labelstudio_backend.local_label_studio import Process\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        f"p = Process('it', command, dict(os.environ), Path({str(tmp_path)!r}) / 'log')\n"
        "print(p.pid, flush=True)\ntime.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    wait(lambda: b"prctl" not in Path(f"/proc/{child}/cmdline").read_bytes(), what="asking to die with its parent")
    assert alive(child)
    parent.kill()
    parent.wait()
    wait(lambda: not alive(child))


# -- the command ---------------------------------------------------------------------------------------------------


def test_a_taken_port_and_a_folder_in_use_are_one_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(main, ["up", "--dir", str(tmp_path), "--port", port, "--no-browser"])
    assert result.exit_code == 1
    assert f"port {port} of Label Studio is taken" in result.output
    assert "Traceback" not in result.output


def test_another_port_than_the_remembered_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "up.json").write_text('{"port": 18080}')
    result = CliRunner().invoke(main, ["up", "--dir", str(tmp_path), "--port", "18081", "--no-browser"])
    assert result.exit_code == 1
    assert "use --port 18080 or another --dir." in result.output


def test_a_remembered_port_that_is_taken_does_not_advise_another_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "up.json").write_text(json.dumps({"port": taken.getsockname()[1]}))
        result = CliRunner().invoke(main, ["up", "--dir", str(tmp_path), "--no-browser"])
    assert result.exit_code == 1
    assert "give another --dir" in result.output
    assert "--port" not in result.output


def test_loopback_goes_past_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    past = local_label_studio.past_proxies
    assert past({"A": "b"}) == {"A": "b", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    assert past({"no_proxy": "a, localhost", "NO_PROXY": "b"})["no_proxy"] == "a,localhost,b,127.0.0.1"
    assert past({"NO_PROXY": "*"})["no_proxy"] == "*"
    given: list[dict[str, str]] = []

    class Recorded:
        def __init__(self, name: str, command: list[str], environment: dict[str, str], log: Path) -> None:
            given.append(environment)

        def wait_until(self, *_: object) -> None: ...

        def stop(self, *_: object) -> None: ...

    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "intranet")
    for module in (local_label_studio, up_module):
        monkeypatch.setattr(module, "Process", Recorded)
    monkeypatch.setattr(local_label_studio, "install", lambda: tmp_path / "label-studio")
    (tmp_path / "empty").touch()
    monkeypatch.setattr(local_label_studio, "empty_database", lambda: tmp_path / "empty")
    local_label_studio.start(tmp_path / "data", 18080, Account("a", "b", "c"))
    with ExitStack() as stack:
        up = up_module._Up(tmp_path, stack)
        up.state["backend_port"] = 19090
        up._serve("http://127.0.0.1:18080", "untrained-n")
    assert [e["NO_PROXY"] for e in given] == ["intranet,127.0.0.1,localhost"] * 2


class FakeStudio:
    """As much of Label Studio as the sample project needs."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.tasks: dict[int, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.annotations_left = 10**6
        self.settings: dict[str, Any] = {}

    def projects(self) -> list[dict[str, Any]]:
        return [{"id": number} for number in self.made]

    def create_project(self, title: str, label_config: str) -> dict[str, Any]:
        self.made.append(7 + len(self.made))
        self.labels = [label.attrib for label in ElementTree.fromstring(label_config).iter("Label")]
        return {"id": self.made[-1]}

    def upload_files(self, project: int, files: list[tuple[str, bytes]]) -> None:
        for name, _ in files:
            number = len(self.tasks) + 1
            stored = quote(re.sub(r"[^-\w.]", "", name.replace(" ", "_")))  # as Django makes it
            self.tasks[number] = {"id": number, "data": {"image": f"/data/0123abcd-{stored}"}, "annotations": 0}

    def iter_tasks(self, project: int, *, only_annotated: bool = False, fields: str) -> list[dict[str, Any]]:
        return [task for task in self.tasks.values() if task["annotations"] or not only_annotated]

    def create_annotation(self, task: int, result: object) -> None:
        if self.annotations_left == 0:
            raise KeyboardInterrupt
        self.annotations_left -= 1
        self.tasks[task]["annotations"] += 1

    def ml_backends(self, project: int) -> list[dict[str, Any]]:
        return [dict(row) for row in self.rows]

    def add_ml_backend(self, project: int, url: str, title: str) -> None:
        number = len(self.rows) + 1
        self.rows.append({"id": number, "project": project, "url": url, "title": title, "model_version": "v0"})

    def patch_ml_backend(self, row: dict[str, Any], **values: Any) -> dict[str, Any]:
        stored = next(other for other in self.rows if other["id"] == row["id"])
        stored.update({**row, **values})
        return stored

    retitle_ml_backend = LabelStudio.retitle_ml_backend

    def webhooks(self, project: int) -> list[dict[str, Any]]:
        return []

    def create_webhook(self, project: int, url: str, headers: dict[str, str]) -> None: ...

    def get_project(self, project: int) -> dict[str, Any]:
        return {"model_version": "v0", "show_collab_predictions": True, **self.settings}

    def patch_project(self, project: int, **values: Any) -> None:
        self.settings.update(values)


def test_a_first_start_that_was_stopped_in_the_middle_leaves_no_second_project(tmp_path: Path) -> None:
    studio = FakeStudio()
    studio.annotations_left = 3
    with ExitStack() as stack:
        up = up_module._Up(tmp_path, stack)
        up.state["backend_port"] = 19090
        with pytest.raises(KeyboardInterrupt):
            up._project(studio)  # type: ignore[arg-type]
    studio.annotations_left = 10**6
    with ExitStack() as stack:
        up = up_module._Up(tmp_path, stack)
        up.state["backend_port"] = 19090
        up._project(studio)  # type: ignore[arg-type]
        assert up.state["project"] == 7
    assert studio.made == [7]
    assert [task["annotations"] for task in studio.tasks.values()].count(1) == LABELLED_IMAGES
    assert len(studio.tasks) == SAMPLE_IMAGES


def test_a_backend_that_the_person_connected_is_left_alone(tmp_path: Path) -> None:
    studio = FakeStudio()
    studio.made = [7]
    studio.add_ml_backend(7, "http://127.0.0.1:5000", "mine")
    studio.add_ml_backend(7, "http://127.0.0.1:19090", "yolonas")
    with ExitStack() as stack:
        up = up_module._Up(tmp_path, stack)
        up.state |= {"project": 7, "filled": True, "connected": "http://127.0.0.1:19090", "backend_port": 19091}
        assert up._project(studio)["id"] == 2  # type: ignore[arg-type]
        assert up.state["connected"] == "http://127.0.0.1:19091"
    assert [row["url"] for row in studio.rows] == ["http://127.0.0.1:5000", "http://127.0.0.1:19091"]


def test_a_folder_of_images_becomes_the_project_once(tmp_path: Path) -> None:
    images = tmp_path / "my images"
    images.mkdir()
    for name in ("a.jpg", "b (2) & c.png", "é.JPG", "notes.txt"):
        (images / name).write_bytes(b"x")
    studio = FakeStudio()
    for weights in ("untrained-n", "auto"):  # the second start finds the first one's project
        with ExitStack() as stack:
            up = up_module._Up(tmp_path / "up", stack)
            up.choose(images, weights, ["red", 'b"lue'])
            up.state["backend_port"] = 19090
            up._project(studio)  # type: ignore[arg-type]
        assert up.state["weights"] == "untrained-n", "the second start asks for none"
    assert studio.made == [7]
    assert [task["data"]["image"][15:] for task in studio.tasks.values()] == ["a.jpg", "b_2__c.png", "%C3%A9.JPG"]
    assert not any(task["annotations"] for task in studio.tasks.values())
    assert [value["value"] for value in studio.labels] == ["red", 'b"lue']
    with ExitStack() as stack, pytest.raises(YolonasError, match="give another --dir"):
        up_module._Up(tmp_path / "up", stack).choose(tmp_path, "untrained-n", [])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--labels", "a"], "--labels are for your own images"),
        (["--images", "{empty}"], "holds no image"),
        (["--images", "{images}", "--weights", "untrained-n"], "nothing says what to label"),
        (["--images", "{images}", "--weights", "no_such"], "no_such is not a file"),
    ],
)
def test_images_and_labels_that_do_not_go_together_are_one_sentence(
    options: list[str], sentence: str, tmp_path: Path
) -> None:
    places = {"empty": tmp_path / "empty", "images": tmp_path / "images"}
    for place in places.values():
        place.mkdir()
    (places["images"] / "a.jpg").write_bytes(b"x")
    given = [option.format(**places) for option in options]
    result = CliRunner().invoke(main, ["up", "--dir", str(tmp_path / "up"), "--no-browser", *given])
    assert result.exit_code == 1
    assert sentence in result.output
    assert "Traceback" not in result.output


class Up:
    """`yolonas-labelstudio up` as a process."""

    def __init__(self, folder: Path, log: Path, port: int) -> None:
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "labelstudio_backend.cli", "up", "--dir", str(folder), "--no-browser"]
        settings = {"YOLONAS_TRAIN_MINUTES": "0.4", "YOLONAS_RECONCILE_SECONDS": "5", "PYTHONUNBUFFERED": "1"}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, "--weights", "untrained-n", "--port", str(port), "--backend-port", str(free_port())],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | settings,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, text: str, seconds: float) -> None:
        wait(lambda: text in self.output or self.process.poll() is not None, seconds, f"{text!r} in {self.output}")
        assert text in self.output, self.output

    def descendants(self) -> list[int]:
        """Label Studio, the backend and its trainings: all that came from this process, whatever their session."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        found = [self.process.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found[1:]

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(90)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "up"


@pytest.mark.labelstudio
@pytest.mark.timeout(1200)
def test_up_makes_the_loop_run_stops_all_of_it_and_finds_it_again(folder: Path, tmp_path: Path) -> None:
    port = free_port()
    up = Up(folder, tmp_path / "first.txt", port)
    try:
        up.wait_for("Ctrl-C stops all of it", 900)
        account = json.loads((folder / "account.json").read_text())
        assert account["password"] in up.output
        client = LabelStudio(up.url, account["token"])
        (project,) = client.projects()
        assert project["title"] == TITLE
        assert (project["task_number"], project["num_tasks_with_annotations"]) == (SAMPLE_IMAGES, LABELLED_IMAGES)
        assert project["show_collab_predictions"]
        up.wait_for("-v1 serves", 300)
        (registry,) = Registry(folder / "backend" / "projects").projects()
        name = registry.current().name
        wait(lambda: client.ml_backends(project["id"])[0]["title"] == name, 60, "title")
        wait(lambda: client.count_predictions(project["id"], name) == SAMPLE_IMAGES, 120, "predictions")

        second = Up(folder, tmp_path / "second.txt", port)
        assert second.process.wait(60) == 1
        assert "is in use by another `up`" in second.output

        client.train(client.ml_backends(project["id"])[0]["id"])
        up.wait_for("Training 2: 10 %", 120)
        family = up.descendants()
        assert len(family) >= 3, "Label Studio, the backend, a training"
        assert up.stop(signal.SIGTERM) == 0
        wait(lambda: not any(alive(pid) for pid in family), 60, "orphans")
        assert not local_label_studio.answers(f"{up.url}/health")
        job = Jobs(folder / "backend" / "jobs.sqlite").find()[-1]
        assert (job.id, job.state) == (2, "queued")
    finally:
        up.process.kill()

    up = Up(folder, tmp_path / "third.txt", port)
    try:
        up.wait_for("Ctrl-C stops all of it", 300)
        assert [found["id"] for found in client.projects()] == [project["id"]]
        up.wait_for("Training 2: ", 60)
        backend = client.ml_backends(project["id"])[0]["url"]
        assert httpx.get(f"{backend}/versions").json()["versions"][-1] == registry.current().name
        wait(
            lambda: Jobs(folder / "backend" / "jobs.sqlite").find()[-1].state in ("succeeded", "refused"), 240, "job 2"
        )
        family = up.descendants()
        assert up.stop(signal.SIGINT) == 0
        wait(lambda: not any(alive(pid) for pid in family), 60, "orphans")
    finally:
        up.process.kill()
