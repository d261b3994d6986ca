from __future__ import annotations

import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labelstudio_backend import job_runner
from labelstudio_backend.job import Job
from labelstudio_backend.job_queue import JobQueue, QueueError
from labelstudio_backend.job_runner import JobRunner, tell_end
from labelstudio_backend.jobs import Jobs
from labelstudio_backend.redis_jobs import RedisJobs
from labelstudio_backend.registry import ProjectRegistry, Registry
from real_label_studio import wait

SLEEP = "import time; time.sleep(60)"
LINGER = (
    "import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: None)\n"
    "print('ready', flush=True)\n[time.sleep(0.05) for _ in range(1200)]"
)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs.sqlite")


@pytest.fixture(params=["sqlite", "redis"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> JobQueue:
    """What keeps the queue makes no difference."""
    if request.param == "sqlite":
        return Jobs(tmp_path / "jobs.sqlite")
    return RedisJobs.open(request.getfixturevalue("redis_url"), tmp_path / "jobs")


def versions(jobs: Jobs) -> Registry:
    return Registry(jobs.path.parent / "projects")


Start = Callable[..., JobRunner]


@pytest.fixture
def start(jobs: Jobs) -> Iterator[Start]:
    """Starts runners whose jobs run a line of Python; what is left is stopped at the end."""
    runners: list[JobRunner] = []

    def begin(code: str | Callable[[Job], str] = SLEEP, **options: object) -> JobRunner:
        def command(job: Job) -> list[str]:
            return [sys.executable, "-c", code if isinstance(code, str) else code(job)]

        runner = JobRunner(
            jobs,
            versions(jobs),
            command,
            poll_seconds=0.05,
            **{"stop_seconds": 1.0, **options},
        )  # type: ignore[arg-type]
        runner.start()
        runners.append(runner)
        return runner

    yield begin
    for runner in runners:
        runner.stop()


def state(jobs: JobQueue, job_id: int) -> str:
    job = jobs.get(job_id)
    assert job is not None
    return job.state


def child_of(runner: JobRunner, job_id: int) -> int:
    wait(lambda: job_id in runner._children)
    return runner._children[job_id].pid


def finishing(jobs: Jobs, outcome: str = "succeeded") -> Callable[[Job], str]:
    """Code of a process that writes its own end, as the training job does."""
    root = Path(__file__).resolve().parents[2]
    return lambda job: (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'python')!r}]\n"
        "from pathlib import Path\nfrom labelstudio_backend.jobs import Jobs\n"
        f"Jobs(Path({str(jobs.path)!r})).finish({job.id}, {outcome!r}, 'done', version='v', record={{'n': 1}})"
    )


def test_a_waiting_job_absorbs_requests_and_a_running_one_does_not(queue: JobQueue) -> None:
    first = queue.enqueue("a", "START_TRAINING")
    assert queue.enqueue("a", "20 corrected tasks") == first
    other = queue.enqueue("b", "START_TRAINING")
    claimed = queue.claim(parallel=2)
    assert claimed is not None
    assert (claimed.id, claimed.state) == (first, "running")
    second = queue.enqueue("a", "START_TRAINING")
    assert second not in (first, other)
    assert queue.enqueue("a", "START_TRAINING") == second


def test_one_job_of_a_project_runs_at_a_time(queue: JobQueue) -> None:
    first = queue.enqueue("a", "x")
    queue.claim(parallel=8)
    second, other = queue.enqueue("a", "x"), queue.enqueue("b", "x")
    assert queue.claim(parallel=1) is None
    claimed = queue.claim(parallel=8)
    assert claimed is not None
    assert claimed.id == other, "the second job of `a` waits for the first"
    queue.finish(first, "refused", "worse")
    claimed = queue.claim(parallel=8)
    assert claimed is not None
    assert claimed.id == second


def test_parallel_claims_never_hand_out_a_job_twice(queue: JobQueue) -> None:
    ids = {queue.enqueue(f"project {n}", "x") for n in range(20)}
    claimed: list[int] = []

    def work() -> None:
        while (job := queue.claim(parallel=100)) is not None:
            claimed.append(job.id)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(ids)


def test_progress_and_manifest_are_kept_and_an_ended_job_does_not_change(queue: JobQueue) -> None:
    job_id = queue.enqueue("a", "x")
    queue.claim()
    curve = [{"epoch": 2, "loss": 1.5, "ap50": 0.75}, {"epoch": 3, "loss": 1.25}]
    queue.report(job_id, progress=0.25, reason="epoch 3", manifest={"7": "3@x"})
    queue.report(job_id, epoch=3, seconds_left=60.0, curve=curve)
    job = queue.get(job_id)
    assert job is not None
    assert (job.progress, job.reason, job.manifest) == (0.25, "epoch 3", {"7": "3@x"})
    assert (job.epoch, job.seconds_left, job.curve) == (3, 60.0, curve)
    assert queue.status(str(job_id)) == {
        "job_status": "started",
        "state": "running",
        "reason": "epoch 3",
        "progress": 0.25,
        "epoch": 3,
        "seconds_left": 60.0,
        "ap50": 0.75,
        "model_version": None,
    }
    assert queue.finish(job_id, "failed", "no boxes")
    assert not queue.finish(job_id, "succeeded", "late")
    queue.report(job_id, reason="later")
    job = queue.get(job_id)
    assert job is not None
    assert (job.state, job.reason) == ("failed", "no boxes")
    assert queue.status("999") is None
    assert queue.status("nonsense") is None
    assert queue.status("9" * 40) is None


def test_the_process_writes_its_own_end_and_the_server_hears_of_it(jobs: Jobs, start: Start) -> None:
    ended: list[Job] = []
    job_id = jobs.enqueue("a", "x")
    start(finishing(jobs), on_end=ended.append)
    wait(lambda: bool(ended))
    assert [(j.id, j.state, j.version, j.record) for j in ended] == [(job_id, "succeeded", "v", {"n": 1})]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory, perhaps) after it had gone on once"),
        ("pass", "exit code 0"),
    ],
)
def test_a_process_that_ends_without_a_word_has_failed(jobs: Jobs, start: Start, code: str, reason: str) -> None:
    ended: list[Job] = []
    job_id = jobs.enqueue("a", "x")
    folder = jobs.folder(job_id)
    for name in ("images/1-0", "training/resume.pt", "training/results.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    start(code, on_end=ended.append)
    wait(lambda: bool(ended))
    assert ended[0].state == "failed"
    assert reason in ended[0].reason
    assert (folder / "training" / "resume.pt").exists(), "it can be retried"
    again = jobs.enqueue("a", "x")
    wait(lambda: len(ended) == 2)
    assert ended[1].id == again
    assert not (folder / "images").exists(), "what killed jobs leave does not fill the disk"
    assert [path.name for path in (folder / "training").iterdir()] == ["results.csv"]


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_process_that_was_killed_after_it_had_published_has_succeeded(
    jobs: Jobs, start: Start, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    project = versions(jobs).register("http://ls", "5.1795289898")
    project.ensure_start("untrained-n", ["Car"])
    weights = jobs.path.parent / "model.safetensors"
    weights.write_bytes(b"weights")
    ended: list[Job] = []
    first = jobs.enqueue(project.key, "x")
    with monkeypatch.context() as patch:  # killed before it became current, too
        patch.setattr(ProjectRegistry, "_may_serve", lambda *_: False)
        version = project.publish(weights, {"job": first, "tasks": {"train": 3}, "manifest": {"1": {}}})
    assert project.current().number == 0
    runner = start("import os, time; time.sleep(0.5); os.kill(os.getpid(), 9)", on_end=ended.append)
    child_of(runner, first)
    if cancelled:
        jobs.cancel(first)
    wait(lambda: bool(ended))
    assert [(job.id, job.state, job.version) for job in ended] == [(first, "succeeded", version.name)]
    assert "before it could say more" in ended[0].reason
    assert ended[0].record["tasks"] == {"train": 3}
    assert "manifest" not in ended[0].record
    assert project.current().name == version.name


def test_a_version_of_a_job_with_the_same_number_of_a_lost_queue_is_another_one_s(jobs: Jobs, start: Start) -> None:
    project = versions(jobs).register("http://ls", "5.1795289898")
    project.ensure_start("untrained-n", ["Car"])
    weights = jobs.path.parent / "model.safetensors"
    weights.write_bytes(b"weights")
    project.publish(weights, {"job": 1})
    job_id = jobs.enqueue(project.key, "x")
    assert job_id == 1
    start("import os; os.kill(os.getpid(), 9)")
    wait(lambda: state(jobs, job_id) == "failed")
    job = jobs.get(job_id)
    assert job is not None
    assert "yolonas-labelstudio jobs retry 1" in job.reason


def test_a_project_that_cannot_be_read_keeps_no_other_from_training(
    jobs: Jobs, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = versions(jobs).register("http://ls", "5.1795289898")
    project.ensure_start("untrained-n", ["Car"])

    def unreadable(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(ProjectRegistry, "made_by", unreadable)
    killed, other = jobs.enqueue(project.key, "x"), jobs.enqueue("b", "x")
    done = finishing(jobs)
    start(lambda job: "import os; os.kill(os.getpid(), 9)" if job.id == killed else done(job))
    wait(lambda: state(jobs, other) == "succeeded")
    wait(lambda: state(jobs, killed) == "failed")


def test_a_command_that_cannot_be_run_fails_with_the_reason(jobs: Jobs) -> None:
    job_id = jobs.enqueue("a", "x")
    runner = JobRunner(jobs, versions(jobs), lambda job: ["/nonexistent/python"], poll_seconds=0.05)
    runner.start()
    wait(lambda: state(jobs, job_id) == "failed")
    runner.stop()
    job = jobs.get(job_id)
    assert job is not None
    assert "/nonexistent/python" in job.reason


def test_what_the_process_prints_is_kept(jobs: Jobs, start: Start) -> None:
    job_id = jobs.enqueue("a", "x")
    start("print('hello from the job'); raise SystemExit(1)")
    wait(lambda: state(jobs, job_id) == "failed")
    assert "hello from the job" in (jobs.folder(job_id) / "log.txt").read_text()


def test_cancel_ends_a_waiting_and_a_running_job(jobs: Jobs, start: Start) -> None:
    waiting = jobs.enqueue("a", "x")
    assert jobs.cancel(waiting)
    assert state(jobs, waiting) == "cancelled"
    running = jobs.enqueue("a", "x")
    stubborn = jobs.enqueue("b", "x")
    runner = start(lambda job: SLEEP if job.id == running else LINGER, parallel=2)
    pids = [child_of(runner, job_id) for job_id in (running, stubborn)]
    wait(lambda: "ready" in (jobs.folder(stubborn) / "log.txt").read_text())
    assert jobs.cancel(running)
    assert jobs.cancel(stubborn)
    wait(lambda: state(jobs, running) == state(jobs, stubborn) == "cancelled")
    assert not jobs.cancel(running)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_stopping_the_server_ends_the_process_and_the_job_goes_on_later(jobs: Jobs, start: Start) -> None:
    job_id = jobs.enqueue("a", "x")
    runner = start()
    pid = child_of(runner, job_id)
    runner.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    job = jobs.get(job_id)
    assert job is not None
    assert (job.state, job.restarts) == ("queued", 0)
    start(finishing(jobs))
    wait(lambda: state(jobs, job_id) == "succeeded")


def test_stopping_the_server_tells_a_cancelled_job_that_had_published_as_published(jobs: Jobs, start: Start) -> None:
    project = versions(jobs).register("http://ls", "5.1795289898")
    project.ensure_start("untrained-n", ["Car"])
    weights = jobs.path.parent / "model.safetensors"
    weights.write_bytes(b"weights")
    job_id = jobs.enqueue(project.key, "x")
    runner = start()
    child_of(runner, job_id)
    version = project.publish(weights, {"job": job_id})
    runner._stopping.set()  # the thread sees nothing of the cancellation any more
    runner._thread.join()
    jobs.cancel(job_id)
    runner.stop()
    job = jobs.get(job_id)
    assert job is not None
    assert (job.state, job.version) == ("succeeded", version.name)


def test_a_job_whose_server_was_killed_is_adopted_while_it_lives(jobs: Jobs, start: Start) -> None:
    job_id = jobs.enqueue("a", "x")
    dead = start()
    pid = child_of(dead, job_id)
    # What a killed server leaves: a process that holds the lock, a row that says running, nobody who watches.
    dead._stopping.set()
    dead._thread.join()
    child = dead._children.pop(job_id)
    start(finishing(jobs))
    time.sleep(0.5)
    assert state(jobs, job_id) == "running", "alive, so it is left alone"
    os.kill(pid, signal.SIGKILL)
    child.wait()
    wait(lambda: state(jobs, job_id) == "succeeded")
    job = jobs.get(job_id)
    assert job is not None
    assert job.restarts == 1


def test_the_end_of_an_adopted_job_is_passed_on_once(jobs: Jobs, start: Start) -> None:
    job_id, go = jobs.enqueue("a", "x"), jobs.path.with_name("go")
    done = finishing(jobs)
    waiting = f"import pathlib, time\nwhile not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n"
    dead = start(lambda job: waiting + done(job))
    child_of(dead, job_id)
    dead._stopping.set()
    dead._thread.join()
    child = dead._children.pop(job_id)
    ended: list[Job] = []
    runner = start(on_end=ended.append)
    wait(lambda: job_id in runner._untold)
    go.touch()
    assert child.wait(60) == 0
    wait(lambda: bool(ended))
    other = jobs.enqueue("b", "x")
    child_of(runner, other)  # it has looked again
    assert [(job.id, job.state) for job in ended] == [(job_id, "succeeded")]
    assert not runner._untold


def test_stopping_the_server_ends_an_adopted_job_too(jobs: Jobs, start: Start) -> None:
    job_id = jobs.enqueue("a", "x")
    dead = start()
    child_of(dead, job_id)
    dead._stopping.set()
    dead._thread.join()
    child = dead._children.pop(job_id)
    start().stop()
    assert child.wait(60) == -signal.SIGTERM
    assert state(jobs, job_id) == "queued"


def test_a_job_interrupted_twice_has_failed(jobs: Jobs, start: Start) -> None:
    job_id = jobs.enqueue("a", "x")
    jobs.claim()
    jobs.requeue(job_id, "interrupted", count=True)
    jobs.claim()
    start()
    wait(lambda: state(jobs, job_id) == "failed")
    job = jobs.get(job_id)
    assert job is not None
    assert "gone on once" in job.reason


def test_a_job_put_back_goes_on_before_the_one_that_waits_behind_it_and_learns_more(queue: JobQueue) -> None:
    first = queue.enqueue("a", "x")
    queue.claim()
    second = queue.enqueue("a", "asked for while the first ran")
    queue.requeue(first, "stopped", count=False)
    assert (state(queue, first), state(queue, second)) == ("queued", "queued")
    assert queue.enqueue("a", "x") == second, "the first goes on with the labels that it has"
    assert queue.claim(job_id=second) is None, "one after the other"
    for job_id in (first, second):
        claimed = queue.claim()
        assert claimed is not None
        assert claimed.id == job_id
        assert queue.claim(parallel=8) is None
        queue.finish(job_id, "succeeded", "done")


def test_a_request_is_not_taken_for_a_job_that_was_put_back_or_is_run_again(queue: JobQueue) -> None:
    first = queue.enqueue("a", "x")
    queue.claim()
    queue.requeue(first, "stopped", count=False)
    second = queue.enqueue("a", "x")
    assert second != first
    for job_id in (first, second):
        queue.claim()
        queue.finish(job_id, "failed", "no")
    assert queue.retry(first) == first
    assert queue.enqueue("a", "x") not in (first, second)


@pytest.mark.parametrize("code", ["raise SystemExit(75)", "import os; os.kill(os.getpid(), 15)"])
def test_a_job_that_was_told_to_end_by_others_goes_on_without_a_crash_counted(
    jobs: Jobs, start: Start, code: str
) -> None:
    job_id = jobs.enqueue("a", "x")
    once = jobs.path.with_name("once")
    done = finishing(jobs)
    start(lambda job: done(job) if once.exists() else f"open({str(once)!r}, 'w').close()\n{code}")
    wait(lambda: state(jobs, job_id) in ("succeeded", "failed"))
    job = jobs.get(job_id)
    assert job is not None
    assert (job.state, job.restarts) == ("succeeded", 0)


@pytest.mark.parametrize("by_a_worker", [False, True])
def test_a_job_whose_process_alone_is_killed_goes_on_once(jobs: Jobs, start: Start, by_a_worker: bool) -> None:
    job_id = jobs.enqueue("a", "x")
    once = jobs.path.with_name("once")
    done = finishing(jobs)
    killed = f"import os; open({str(once)!r}, 'w').close()\nos.kill(os.getpid(), 9)"
    if by_a_worker:
        command = [sys.executable, "-c", killed]
        JobRunner(jobs, versions(jobs), lambda job: command, poll_seconds=0.02).run_one(job_id)
        waits = jobs.get(job_id)
        assert waits is not None
        assert waits.state == "queued"
        assert waits.reason == "the job's process was killed by SIGKILL (out of memory, perhaps); goes on"
    start(lambda job: done(job) if once.exists() else killed)
    wait(lambda: state(jobs, job_id) in ("succeeded", "failed"))
    job = jobs.get(job_id)
    assert job is not None
    assert (job.state, job.restarts) == ("succeeded", 1)


def test_an_error_nobody_thought_of_does_not_end_the_thread(
    jobs: Jobs, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "claim", lambda parallel, job_id: 1 / 0)
    job_id = jobs.enqueue("a", "x")
    runner = start(finishing(jobs))
    time.sleep(0.3)
    monkeypatch.undo()
    wait(lambda: state(jobs, job_id) == "succeeded")
    assert runner._thread.is_alive()


def test_what_ended_while_no_server_ran_leaves_images_only_where_it_can_be_retried(jobs: Jobs, start: Start) -> None:
    ids = []
    for project, outcome in (("a", "failed"), ("a", "succeeded"), ("b", "refused"), ("b", "failed")):
        ids.append(jobs.enqueue(project, "x"))
        jobs.finish(ids[-1], outcome, "no server ran")  # type: ignore[arg-type]
        (jobs.folder(ids[-1]) / "images").mkdir(parents=True)
    start()
    wait(lambda: [(jobs.folder(job_id) / "images").exists() for job_id in ids] == [False, False, False, True])


def test_a_failed_or_cancelled_job_is_retried_under_its_number(jobs: Jobs, start: Start) -> None:
    first = jobs.enqueue("a", "x")
    assert jobs.retry(first) is None, "it waits already"
    assert jobs.retry(99) is None
    once = jobs.path.with_name("once")
    done = finishing(jobs)
    runner = start(lambda job: done(job) if once.exists() else f"open({str(once)!r}, 'w').close()\nraise SystemExit(3)")
    wait(lambda: state(jobs, first) == "failed")
    assert jobs.retry(first) == first
    wait(lambda: state(jobs, first) == "succeeded")
    runner.stop()  # or it starts what is to wait
    assert jobs.retry(first) is None
    second = jobs.enqueue("b", "x")
    jobs.cancel(second)
    third = jobs.enqueue("b", "x")
    assert jobs.retry(second) == third, "one that waits does in its place"
    job = jobs.get(second)
    assert job is not None
    assert (job.state, job.reason) == ("cancelled", "cancelled before it started")


def test_ended_jobs_are_forgotten_but_for_the_newest_and_those_that_are_needed(queue: JobQueue) -> None:
    for number in range(1, 10):
        job_id = queue.enqueue("a", "x")
        assert job_id == number
        queue.finish(job_id, "succeeded" if number < 4 else "failed", "ended")
        queue.folder(job_id).mkdir(parents=True)
    other, waits = queue.enqueue("b", "x"), queue.enqueue("a", "x")
    assert queue.prune("a", keep={1}, newest=3) == [2, 4, 5, 6], "3 is the last that learnt"
    assert [job.id for job in queue.find()] == [1, 3, 7, 8, 9, other, waits]
    assert sorted(int(path.name) for path in queue.folder(1).parent.iterdir()) == [1, 3, 7, 8, 9]
    queue.cancel(waits)
    assert queue.enqueue("a", "x") == waits + 1


def test_a_queue_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    Jobs(path)
    with sqlite3.connect(path) as db:
        for column in ("epoch", "seconds_left", "curve"):
            db.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
        db.execute("INSERT INTO jobs (project, trigger, created) VALUES ('a', 'x', 1.0)")
    job = Jobs(path).get(1)
    assert job is not None
    assert (job.epoch, job.curve) == (None, [])


def test_one_job_of_the_queue_runs_here_and_no_other(jobs: Jobs) -> None:
    first, other = jobs.enqueue("a", "x"), jobs.enqueue("b", "x")
    done = finishing(jobs)
    runner = JobRunner(jobs, versions(jobs), lambda job: [sys.executable, "-c", done(job)], poll_seconds=0.02)
    runner.run_one(other)
    assert (state(jobs, first), state(jobs, other)) == ("queued", "succeeded")
    runner.run_one(other)
    assert state(jobs, other) == "succeeded"


def test_one_job_that_is_stopped_goes_back_to_the_queue(jobs: Jobs) -> None:
    job_id = jobs.enqueue("a", "x")
    runner = JobRunner(jobs, versions(jobs), lambda job: [sys.executable, "-c", SLEEP], poll_seconds=0.02)
    thread = threading.Thread(target=runner.run_one, args=(job_id,))
    thread.start()
    pid = child_of(runner, job_id)
    runner._stopping.set()
    thread.join(60)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert state(jobs, job_id) == "queued"


def test_a_brief_list_reads_neither_manifest_nor_record(queue: JobQueue) -> None:
    job_id = queue.enqueue("a", "x")
    queue.claim()
    queue.report(job_id, manifest={"1": "1@x"})
    queue.finish(job_id, "succeeded", "done", version="v", record={"n": 1})
    (brief,), (whole,) = queue.find("a", brief=True), queue.find("a")
    assert (brief.manifest, brief.record, brief.version) == (None, {}, "v")
    assert (whole.manifest, whole.record) == ({"1": "1@x"}, {"n": 1})


def test_a_listener_that_raises_does_not_stop_the_queue(jobs: Jobs, start: Start) -> None:
    def listener(job: Job) -> None:
        raise RuntimeError("no")

    first = jobs.enqueue("a", "x")
    start("raise SystemExit(1)", on_end=listener)
    wait(lambda: state(jobs, first) == "failed")
    second = jobs.enqueue("a", "x")
    wait(lambda: state(jobs, second) == "failed")


def test_a_file_that_may_not_be_removed_does_not_keep_the_end_from_being_passed_on(
    queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = queue.enqueue("a", "x")
    queue.finish(job_id, "refused", "worse")
    left = queue.folder(job_id) / "model.safetensors"
    left.parent.mkdir(parents=True)
    left.touch()

    def others(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError("of another user")

    monkeypatch.setattr(Path, "unlink", others)
    job = queue.get(job_id)
    assert job is not None
    ended: list[Job] = []
    tell_end(queue, job, ended.append)
    assert ended == [job]
    assert left.exists()


def test_two_servers_of_one_queue_run_each_job_once(jobs: Jobs, start: Start) -> None:
    ids = [jobs.enqueue(f"project {number}", "x") for number in range(6)]
    done = finishing(jobs)

    def counting(job: Job) -> str:
        return f"open({str(jobs.path.with_name('lives'))!r}, 'a').write('{job.id} ')\n{done(job)}"

    for _ in range(2):
        start(counting, parallel=3)
    wait(lambda: {job.state for job in jobs.find()} == {"succeeded"})
    assert sorted(map(int, jobs.path.with_name("lives").read_text().split())) == ids
    assert {job.restarts for job in jobs.find()} == {0}


def test_a_queue_that_cannot_be_read_is_a_sentence(jobs: Jobs) -> None:
    job = jobs.enqueue("a", "by hand")
    jobs.path.write_bytes(b"as after a disk error" * 1000)
    for use in (lambda: jobs.get(job), lambda: jobs.enqueue("a", "by hand"), lambda: Jobs(jobs.path)):
        with pytest.raises(QueueError, match=r"jobs\.sqlite, cannot be read or written \(file is not a database\)"):
            use()


def test_a_process_whose_pid_cannot_be_kept_does_not_run_on(jobs: Jobs, start: Start) -> None:
    """As on a full disk: its job is said to have failed, and another may be running."""
    job = jobs.enqueue("a", "by hand")
    (jobs.folder(job) / "pid").mkdir(parents=True)
    start()
    wait(lambda: state(jobs, job) == "failed")
    ended = jobs.get(job)
    assert ended is not None
    wait(lambda: not job_runner._held(jobs, ended), 20)
