"""The commands `jobs` and `versions` on a state folder without a server."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from labelstudio_backend import jobs_command
from labelstudio_backend.cli import main
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.registry import ProjectRegistry, Registry


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("YOLONAS_STATE_DIR", str(tmp_path))


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs.sqlite")


@pytest.fixture
def project(tmp_path: Path) -> ProjectRegistry:
    project = Registry(tmp_path / "projects").register("http://ls", "5.1795289898")
    project.ensure_start("w.pth", [])
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    for number in (1, 2):
        after = {"ap": 0.25 * number, "ap50": 0.375 * number, "per_class": {"Car": 0.25 * number}}
        before = {"ap": 0.125, "ap50": 0.25, "per_class": {"Car": 0.125}}
        tasks = {"train": 10 * number, "train_boxes": 30, "held_out": 5}
        base = project.current().name
        project.publish(weights, {"base": base, "before": before, "after": after, "tasks": tasks})
    return project


def say(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code, result.output
    return result.output


def test_jobs_are_listed_and_one_is_shown(jobs: Jobs) -> None:
    assert "No training yet" in say("jobs")
    first = jobs.enqueue("5-abc", "START_TRAINING")
    jobs.claim()
    curve = [{"epoch": n, "loss": 1 / n} | ({"ap50": 0.05 * n} if n % 5 == 0 else {}) for n in range(1, 13)]
    jobs.report(first, progress=0.5, reason="training: epoch 12", epoch=12, seconds_left=75.0, curve=curve)
    jobs.enqueue("6-def", "20 newly corrected tasks")
    listed = say("jobs")
    assert " 50% training: epoch 12" in listed
    assert "20 newly corrected tasks" in listed
    assert "6-def" not in say("jobs", "--project", "5")
    shown = say("jobs", "1")
    assert "progress   50%, epoch 12, AP50 0.500, 0:01:15 of training left" in shown
    assert "epoch   12 loss 0.083\n" in shown
    assert "epoch   10 loss 0.100 AP50 0.500\n" in shown
    assert "epoch    2 loss" not in shown, "the last ten"
    tasks = {"train": 8, "held_out": 2, "unusable": 1, "unusable_because": ["task 9: it is gone"]}
    record = {"tasks": tasks, "before": {"ap50": 0.5}, "after": {"ap50": 0.75}}
    jobs.finish(first, "succeeded", "better", version="yolonas-5-abc-v1", record=record)
    shown = say("jobs", "1")
    assert "0.500 -> 0.750" in shown
    assert "8 images to train on, 2 to judge by" in shown
    assert "left out   1, like task 9: it is gone" in shown


def test_jobs_are_cancelled_and_retried_and_errors_are_one_sentence(jobs: Jobs) -> None:
    jobs.enqueue("5-abc", "x")
    assert "only a failed or cancelled one" in say("jobs", "retry", "1", code=1)
    assert say("jobs", "cancel", "1") == "Job 1: cancelled before it started.\n"
    assert "has ended already: cancelled" in say("jobs", "cancel", "1", code=1)
    assert say("jobs", "retry", "1") == "Job 1 waits for its turn; the server runs it.\n"
    assert "there is no job '9'" in say("jobs", "9", code=1)
    assert "'burn 1' is not known" in say("jobs", "burn", "1", code=1)


def test_a_log_is_followed_until_the_job_ends(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = jobs.enqueue("5-abc", "x")
    assert "it has not started" in say("jobs", "1", "--log", code=1)
    jobs.claim()
    log = jobs.folder(job_id) / "log.txt"
    log.parent.mkdir(parents=True)
    log.write_text("pulling\n")
    assert say("jobs", "1", "--log") == "pulling\n"

    def later(seconds: float) -> None:
        with log.open("a") as stream:
            stream.write("trained\n")
        jobs.finish(job_id, "succeeded", "done")

    monkeypatch.setattr(jobs_command.time, "sleep", later)
    assert say("jobs", "1", "--follow") == "pulling\ntrained\n"


def test_versions_are_listed_compared_rolled_back_and_pinned(project: ProjectRegistry) -> None:
    lines = say("versions").splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["v0", "v1", "v2"]
    assert "start: w.pth" in lines[2]
    assert lines[4].split()[3:] == ["0.500", "0.750", "20", "serves"]
    compared = say("versions", "--project", "5", "compare", "1", "2")
    assert "measured on the same images" in compared
    rows = {line.split("  ")[1].strip(): line.split()[-3:] for line in compared.splitlines()[2:]}
    assert rows["AP50"] == ["0.250", "0.750", "+0.500"]
    assert rows["AP of Car"] == ["0.125", "0.500", "+0.375"]
    assert rows["training images"] == ["10", "20", "+10"]
    assert "own held-out images" in say("versions", "compare", "2", "1")
    assert "v1 serves" in say("versions", "rollback", "1")
    assert project.current().number == 1
    assert "another was chosen" in say("versions")
    assert "until it is unpinned" in say("versions", "pin", "2")
    assert "serves, pinned" in say("versions", "list")
    assert "until the next version" in say("versions", "unpin")
    assert not project.pinned()


def test_versions_say_which_projects_there_are(project: ProjectRegistry, tmp_path: Path) -> None:
    assert "no version v7" in say("versions", "rollback", "7", code=1)
    other = Registry(tmp_path / "projects").register("http://ls", "6.1795289898")
    other.ensure_start("w.pth", [])
    told = say("versions", "rollback", "1", code=1)
    assert project.key in told
    assert other.key in told
    assert "there is no project '9'" in say("versions", "--project", "9", code=1)
    assert say("versions").count("Project ") == 2
    empty = tmp_path / "empty"
    assert "Label Studio makes it known" in say("versions", "--state-dir", str(empty), code=1)


def test_a_followed_job_shows_what_comes_from_another_process(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command looks again by itself: nothing tells it."""
    monkeypatch.setattr(jobs_command, "FOLLOW_SECONDS", 0.01)
    job_id = jobs.enqueue("5-abc", "x")
    timer = threading.Timer(0.2, jobs.cancel, (job_id,))
    timer.start()
    assert say("jobs", str(job_id), "--follow") == ""
    timer.join()
