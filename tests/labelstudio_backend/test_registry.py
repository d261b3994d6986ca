"""The registry: one name for one content, whatever kills the writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from labelstudio_backend import project_registry
from labelstudio_backend.locks import try_lock
from labelstudio_backend.registry import ProjectRegistry, Registry, project_key
from labelstudio_backend.settings import UNTRAINED
from labelstudio_backend.version import RECORD, RegistryError, Version, class_names, load_checkpoint

HOST, UID = "http://localhost:8080", "5.1795289898"


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "projects")


@pytest.fixture
def project(registry: Registry) -> ProjectRegistry:
    return registry.register(HOST, UID, "<View/>")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    path.write_bytes(b"weights" * 1000)
    return path


def point(project: ProjectRegistry, number: int) -> None:
    """As it is before a newer version became current."""
    (project.path / "current").write_text(json.dumps({"version": number}))


def leftovers(registry: Registry) -> list[Path]:
    return list(registry.root.rglob(".tmp-*"))


def test_version_names_are_unique_across_projects_and_label_studios(registry: Registry) -> None:
    uids = [(HOST, "5.1795289898"), (HOST, "5.1795289899"), (HOST, "51.1795289898"), ("http://other:8080", UID)]
    names = {registry.register(host, uid).ensure_start("w.pth", []).name for host, uid in uids}
    assert len(names) == 4
    assert all(name.startswith(("yolonas-5-", "yolonas-51-")) and name.endswith("-v0") for name in names)


def test_a_hostname_is_the_same_however_it_is_spelled() -> None:
    assert project_key("HTTP://LocalHost:8080/", UID) == project_key(HOST, UID)
    assert project_key("http://localhost:8080/ls", UID) != project_key(HOST, UID)


@pytest.mark.parametrize("uid", ["", "abc", "../../5.1", "-5.1"])
def test_an_odd_project_identifier_is_refused(uid: str) -> None:
    with pytest.raises(ValueError, match="Label Studio sends"):
        project_key(HOST, uid)


def test_metadata_is_kept_and_merged(registry: Registry, project: ProjectRegistry) -> None:
    project.update(labels=["Car"])
    again = registry.register("http://LOCALHOST:8080/", UID, "<View></View>")
    assert again.key == project.key
    assert again.metadata() == {
        "hostname": HOST,
        "uid": UID,
        "project_id": 5,
        "label_config": "<View></View>",
        "labels": ["Car"],
    }
    assert project.project_id == 5
    assert [p.key for p in registry.projects()] == [project.key]
    with pytest.raises(RegistryError, match="no project"):
        registry.project("../" + project.key)


def test_find_prefers_the_label_studio_seen_last(registry: Registry, project: ProjectRegistry) -> None:
    other = registry.register("http://other:8080", UID)
    os.utime(other.path / "project.json", (1, 1))
    assert registry.find(UID) is not None
    assert registry.find(UID).key == project.key  # type: ignore[union-attr]
    os.utime(project.path / "project.json", (0, 0))
    assert registry.find(UID).key == other.key  # type: ignore[union-attr]
    assert registry.find("5.1") is None
    assert registry.find("50.1795289898") is None


def test_the_first_version_stands_for_the_start_weights(project: ProjectRegistry, checkpoint: Path) -> None:
    with pytest.raises(RegistryError, match="no version yet"):
        project.current()
    start = project.ensure_start(str(checkpoint), ["Car"])
    assert (start.number, start.trained, start.weights) == (0, False, str(checkpoint))
    assert project.ensure_start(str(checkpoint), ["Car", "Person"]).name == start.name
    checkpoint.write_bytes(b"another")  # replaced in place: other content, other name
    assert project.ensure_start(str(checkpoint), ["Car"]).number == 1
    assert project.ensure_start("yolo_nas_s_coco", ["Car"]).number == 2


def test_an_untrained_start_follows_the_labels_until_something_is_trained(
    project: ProjectRegistry, checkpoint: Path
) -> None:
    assert project.ensure_start(UNTRAINED, ["Car"]).number == 0
    assert project.ensure_start(UNTRAINED, ["Car"]).number == 0
    assert project.ensure_start(UNTRAINED, ["Car", "Person"]).record["labels"] == ["Car", "Person"]
    trained = project.publish(checkpoint, {})
    assert project.ensure_start(UNTRAINED, ["Dog"]).name == trained.name
    assert project.ensure_start("other.pth", ["Dog"]).name == trained.name


def test_publishing(registry: Registry, project: ProjectRegistry, checkpoint: Path) -> None:
    start = project.ensure_start("w.pth", [])
    first = project.publish(checkpoint, {"job": "7", "ap50": 0.5, "kind": "ignored"})
    assert first.name == start.name[:-1] + "1"
    assert first.trained
    assert Path(first.weights).read_bytes() == checkpoint.read_bytes()
    assert (first.record["job"], first.record["parent"]) == ("7", 0)
    checkpoint.write_bytes(b"next")
    second = project.publish(checkpoint, {})
    assert project.current() == second
    assert [version.number for version in project.versions()] == [0, 1, 2]
    assert Path(first.weights).read_bytes() == b"weights" * 1000
    assert project.rollback(1) == first == project.current()
    assert project.publish(checkpoint, {}).record["parent"] == 1
    assert leftovers(registry) == []


def test_publishing_what_is_not_there(project: ProjectRegistry, tmp_path: Path) -> None:
    project.ensure_start("w.pth", [])
    with pytest.raises(FileNotFoundError, match="no checkpoint to publish"):
        project.publish(tmp_path / "gone", {})
    with pytest.raises(RegistryError, match="no version v9"):
        project.rollback(9)
    assert project.current().number == 0


def test_threads_that_publish_and_read_at_once(registry: Registry, checkpoint: Path) -> None:
    def publish(number: int) -> str:
        project = registry.register(HOST, UID, f"<View>{number % 2}</View>")
        project.ensure_start("w.pth", [])
        return project.publish(checkpoint, {"by": number}).name

    done = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not done.is_set():
            project = registry.find(UID)
            if project is not None and (project.path / "current").exists():
                version = project.current()
                assert version.record["number"] == version.number
                assert not version.trained or Path(version.weights).stat().st_size == 7000
                seen.add(version.name)

    with ThreadPoolExecutor(9) as pool:
        reader = pool.submit(read)
        names = list(pool.map(publish, range(16)))
        done.set()
        reader.result()
    assert len(set(names)) == 16
    (project,) = registry.projects()
    starts = [version for version in project.versions() if not version.trained]
    assert len(starts) == 1
    assert len(project.versions()) == 17
    assert seen


@pytest.mark.parametrize("how", ["publish", "rollback"])
def test_a_start_version_never_replaces_what_is_published_meanwhile(
    project: ProjectRegistry, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """/setup with other labels decides on a start version; the trained one must not become current in between."""
    project.ensure_start(UNTRAINED, ["Car"])
    project.publish(checkpoint, {})
    point(project, 0)
    decided, ended = threading.Event(), threading.Event()
    current = ProjectRegistry.current

    def slow(self: ProjectRegistry) -> Version:
        version = current(self)
        if threading.current_thread() is setup and not decided.is_set():
            decided.set()
            ended.wait(0.5)
        return version

    monkeypatch.setattr(ProjectRegistry, "current", slow)
    setup = threading.Thread(target=project.ensure_start, args=(UNTRAINED, ["Car", "Person"]))
    setup.start()
    assert decided.wait(60)
    trained = project.publish(checkpoint, {}) if how == "publish" else project.rollback(1)
    ended.set()
    setup.join(60)
    assert trained.trained
    assert project.current() == trained


def test_setup_does_not_wait_for_a_checkpoint_that_is_being_copied(
    project: ProjectRegistry, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.ensure_start(UNTRAINED, ["Car"])
    copying, go_on = threading.Event(), threading.Event()

    def slow(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes())
        copying.set()
        assert go_on.wait(60)

    monkeypatch.setattr(shutil, "copyfile", slow)
    with ThreadPoolExecutor(2) as pool:
        published = pool.submit(project.publish, checkpoint, {})
        assert copying.wait(60)
        try:
            start = pool.submit(project.ensure_start, UNTRAINED, ["Dog"]).result(timeout=30)
        finally:
            go_on.set()
        assert published.result().record["parent"] == start.number == 1
    assert project.current().number == 2


KILLED = """
import os, sys
from pathlib import Path
from labelstudio_backend.registry import Registry
step, before = int(sys.argv[2]), sys.argv[3] == "before"
count = 0
def killing(function):
    def wrapped(*args, **kwargs):
        global count
        count += 1
        if count == step and before:
            os._exit(9)
        try:
            return function(*args, **kwargs)
        finally:
            if count == step:
                os._exit(9)
    return wrapped
project = Registry(Path(sys.argv[1])).projects()[0]
for name in ("fsync", "rename", "replace", "mkdir"):
    setattr(os, name, killing(getattr(os, name)))
project.publish(Path(sys.argv[4]), {"job": "1"})
"""


def test_a_kill_at_any_step_leaves_the_old_version_or_the_new_one(
    registry: Registry, project: ProjectRegistry, checkpoint: Path
) -> None:
    start = project.ensure_start("w.pth", [])
    killed, left = 0, 0
    for when in ("before", "after"):
        for step in range(1, 30):
            number = max(version.number for version in project.versions())
            command = [sys.executable, "-c", KILLED, str(registry.root), str(step), when, str(checkpoint)]
            code = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}).returncode
            current = project.current()
            assert all(version.record["number"] == version.number for version in project.versions())
            if current.trained:
                assert Path(current.weights).read_bytes() == checkpoint.read_bytes()
            left += len(leftovers(registry))
            registry.clean()
            assert leftovers(registry) == []
            if code == 0:
                assert current.number == number + 1
                break
            assert code == 9
            killed += 1
        point(project, start.number)
    assert killed == 20  # 10 calls reach the disk
    assert left > 5
    assert project.publish(checkpoint, {}) == project.current()


@pytest.mark.parametrize("step", range(1, 7))
def test_a_full_disk_leaves_the_old_version(
    registry: Registry, project: ProjectRegistry, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    start = project.ensure_start("w.pth", [])
    count, fsync = 0, os.fsync

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    # flushed: the checkpoint, the record, their folder, the folder of versions, `current`; last the folder of that,
    # when the new version is in place already
    with pytest.raises(RegistryError, match=r"No space left on device.*free disk space"):
        project.publish(checkpoint, {})
    assert project.current().number == (start.number if step < 6 else 1)
    assert leftovers(registry) == []
    assert project.publish(checkpoint, {}) == project.current()


@pytest.mark.parametrize("damage", ["", "\0\0\0", "[1]", "7", None])
def test_what_cannot_be_read_is_said_and_not_replaced_by_start_weights(
    project: ProjectRegistry, checkpoint: Path, damage: str | None
) -> None:
    project.ensure_start("w.pth", [])
    project.publish(checkpoint, {})

    def spoil(path: Path) -> None:
        path.unlink()
        path.mkdir() if damage is None else path.write_text(damage)

    spoil(project.path / "current")
    why = "Is a directory" if damage is None else "it is damaged"
    sentence = rf"current cannot be read \({why}\): restore it from a backup, or .* --project {project.key} rollback"
    for look in (project.current, project.pinned, lambda: project.ensure_start("w.pth", [])):
        with pytest.raises(RegistryError, match=sentence):
            look()
    assert len(project.names()) == 2
    if damage is not None:
        assert project.rollback(1) == project.current()
    spoil(project.version(1).path / "record.json")
    with pytest.raises(RegistryError, match=r"v1/record.json cannot be read .*if v1 serves, .* rollback NUMBER"):
        project.version(1)
    spoil(project.path / "project.json")
    with pytest.raises(RegistryError, match=r"project.json cannot be read .*delete it"):
        project.metadata()


def test_clean_spares_what_another_process_is_writing(registry: Registry, project: ProjectRegistry) -> None:
    alive, dead = (project.path / "versions" / f".tmp-{name}" for name in ("alive", "dead"))
    for path in (alive, dead):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"part")
    half = project.path / ".current.99999.ab.tmp"
    half.write_text(json.dumps({"version": 3}))
    lock = try_lock(alive / ".lock")
    assert lock is not None
    assert set(registry.clean()) == {dead, half}
    assert leftovers(registry) == [alive]
    os.close(lock)
    assert registry.clean() == [alive]


def published(project: ProjectRegistry, checkpoint: Path, count: int) -> None:
    project.ensure_start("w.pth", [])
    for number in range(1, count + 1):
        assert project.publish(checkpoint, {"manifest": {"1": number}}).number == number


def test_a_rollback_serves_and_what_was_trained_from_another_version_waits(
    project: ProjectRegistry, checkpoint: Path
) -> None:
    published(project, checkpoint, 2)
    assert project.rollback(1) == project.current()
    running = project.publish(checkpoint, {}, base=2)  # its training had begun before the rollback
    assert (running.number, project.current().number) == (3, 1)
    assert running.record["parent"] == 2
    assert not project.take_over(3), "nor after a restart"
    assert not project.take_over(2)
    assert project.rollback(1).number == 1
    started_later = project.publish(checkpoint, {}, base=1)
    assert project.current() == started_later
    assert project.publish(checkpoint, {}, base=1) == project.current(), "nothing of the rollback is left"


def test_a_pinned_version_goes_on_serving(project: ProjectRegistry, checkpoint: Path) -> None:
    published(project, checkpoint, 2)
    assert not project.pinned()
    assert project.pin(1) == project.current()
    assert project.pinned()
    candidate = project.publish(checkpoint, {}, base=1)
    assert not project.take_over(candidate.number)
    assert project.current().number == 1
    assert project.unpin().number == 1
    assert not project.take_over(candidate.number), "a candidate of before waits for a person"
    assert project.publish(checkpoint, {}, base=1) == project.current()
    assert project.rollback(3) == candidate
    with pytest.raises(RegistryError, match="no version v9"):
        project.pin(9)


def test_a_version_whose_publisher_was_killed_takes_over(project: ProjectRegistry, checkpoint: Path) -> None:
    published(project, checkpoint, 1)
    point(project, 0)
    assert project.take_over(1)
    assert project.current().number == 1
    project.publish(checkpoint, {})
    assert not project.take_over(1)


def test_start_weights_that_change_leave_what_a_person_chose(project: ProjectRegistry, checkpoint: Path) -> None:
    published(project, checkpoint, 1)
    project.rollback(0)
    assert project.ensure_start("other.pth", ["Car"]).number == 0


def test_retention_removes_the_oldest_but_nothing_that_is_needed(
    registry: Registry, project: ProjectRegistry, checkpoint: Path
) -> None:
    published(project, checkpoint, 8)
    project.rollback(3)
    assert project.retain(0) == []
    with project.version(1).in_use():
        removed = project.retain(2)
        assert [version.number for version in removed] == [4, 5, 6], "1 is used, 2 the parent, 3 current, 7, 8 new"
    assert [version.number for version in project.retain(2)] == [1]
    assert all(list(version.path.iterdir()) == [version.path / "record.json"] for version in removed)
    assert "manifest" not in removed[0].record
    assert [version.number for version in project.versions()] == list(range(9))
    assert [version.number for version in project.versions() if version.removed] == [1, 4, 5, 6]
    with pytest.raises(RegistryError, match="removed"):
        project.rollback(5)
    with pytest.raises(RegistryError, match="only the record"):
        load_checkpoint(project.version(5))
    assert project.publish(checkpoint, {}).number == 9, "numbers are never given again"
    assert Path(project.version(3).weights).exists()


def test_retention_on_a_full_disk_leaves_no_version_locked(
    project: ProjectRegistry, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published(project, checkpoint, 3)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(project_registry, "_write_json", full)
        with pytest.raises(OSError, match="No space left"):
            project.retain(1)
    lock = try_lock(project.version(1).path / RECORD)
    assert lock is not None, "whoever loads it would wait for ever"
    os.close(lock)


def test_what_a_kill_left_of_a_removed_version_is_removed_later(project: ProjectRegistry, checkpoint: Path) -> None:
    published(project, checkpoint, 4)
    project.retain(1)
    half = project.version(1).path / "model.safetensors"
    half.write_bytes(b"weights")
    assert project.retain(1) == []
    assert not half.exists()


def test_start_weights_that_come_with_yolonas_have_their_own_classes(project: ProjectRegistry) -> None:
    assert class_names(project.ensure_start("yolo_nas_n_bccd", [])) == ("RBC", "WBC", "Platelets")
    assert len(class_names(project.ensure_start("yolo_nas_s_coco", []))) == 80
