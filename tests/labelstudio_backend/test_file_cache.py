"""A folder of bounded size that many processes write at once."""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from labelstudio_backend import file_cache
from labelstudio_backend.file_cache import FileCache

SIZE, KEYS, BOUND = 10_000, 120, 60 * 10_000
PROCESSES, ROUNDS, IN_FLIGHT = 4, 150, 8


def content(key: int) -> bytes:
    return hashlib.sha256(str(key).encode()).digest() * (SIZE // 32)


def held(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/[!.]*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def work(folder: Path, seed: int, trouble: multiprocessing.Queue[str]) -> None:
    """Read or write files of all keys, and look for what must not be."""
    file_cache.PROTECTED = IN_FLIGHT
    cache, choose = FileCache(folder, BOUND), random.Random(seed)
    for number in range(ROUNDS):
        key = choose.randrange(KEYS)
        path = cache.get(str(key)) or cache.put(str(key), content(key))
        try:
            if path.read_bytes() != content(key):
                trouble.put(f"{key} is not whole")
        except FileNotFoundError:  # this process slept while the others turned the whole cache over; it would ask again
            pass
        if number % 50 == 0:
            cache.drop(str(choose.randrange(KEYS)))
        if held(folder) > BOUND + IN_FLIGHT * SIZE:
            trouble.put(f"{held(folder)} bytes")


def test_processes_share_a_folder_and_its_bound(tmp_path: Path) -> None:
    """Twice as many files as fit: no process reads half a file, or sees more than the bound."""
    context = multiprocessing.get_context("fork")
    trouble: multiprocessing.Queue[str] = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, seed, trouble)) for seed in range(PROCESSES)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert trouble.empty(), trouble.get()
    assert BOUND / 2 < held(tmp_path) <= BOUND
    assert not list(tmp_path.rglob(".tmp-*"))
    counted = int((tmp_path / ".lock").read_text())
    assert counted == held(tmp_path)


def test_a_killed_writer_leaves_nothing_that_stays_wrong(tmp_path: Path) -> None:
    def write_for_ever() -> None:
        cache = FileCache(tmp_path, BOUND)
        for number in range(10**9):
            cache.put(str(number % KEYS), content(number % KEYS))

    context = multiprocessing.get_context("fork")
    for _ in range(5):
        worker = context.Process(target=write_for_ever)
        worker.start()
        time.sleep(random.uniform(0.02, 0.1))
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    for path in tmp_path.glob("*/[!.]*"):
        assert path.stat().st_size == SIZE // 32 * 32, "a file appears whole"
    for left_over in tmp_path.rglob(".tmp-*"):
        os.utime(left_over, (0, 0))
    cache = FileCache(tmp_path, BOUND)
    cache.put("one more", b"x")
    assert int((tmp_path / ".lock").read_text()) == held(tmp_path)
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_folder_deleted_while_it_is_used_comes_back(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "media", BOUND)
    path = cache.put("a", b"x" * 10)
    for file in (path, tmp_path / "media" / ".lock"):
        file.unlink()
    path.parent.rmdir()
    assert cache.get("a") is None
    assert cache.put("a", b"y").read_bytes() == b"y"
    assert int((tmp_path / "media" / ".lock").read_text()) == 1


def test_content_is_replaced_and_dropped(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, BOUND)
    cache.put("a", b"x" * 10)
    assert cache.put("a", b"yy").read_bytes() == b"yy"
    assert int((tmp_path / ".lock").read_text()) == 2
    cache.drop("a")
    cache.drop("a")
    assert cache.get("a") is None
    assert int((tmp_path / ".lock").read_text()) == 0


def test_what_was_used_lately_is_left_alone_but_not_without_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_cache, "PROTECTED", 5)
    cache = FileCache(tmp_path, 0)
    paths = [cache.put(str(number), b"x" * 100) for number in range(20)]
    assert all(path.exists() for path in paths[-4:])
    assert held(tmp_path) <= 500


def test_a_change_waits_for_the_one_of_another_process(tmp_path: Path) -> None:
    cache = FileCache(tmp_path, BOUND)
    cache.put("a", b"x")
    lock = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    writer = threading.Thread(target=cache.put, args=("b", b"y"))
    writer.start()
    writer.join(0.3)
    assert writer.is_alive()
    assert not cache.path("b").exists()
    assert cache.get("a") is not None, "reading waits for nobody"
    os.close(lock)
    writer.join(30)
    assert cache.path("b").read_bytes() == b"y"
