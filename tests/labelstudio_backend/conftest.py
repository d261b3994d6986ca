"""Fixtures of the backend's tests."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from real_label_studio import Studio, running


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One real Label Studio for all tests of a run: make a project of your own in it."""
    with running(tmp_path_factory.mktemp("label_studio")) as studio:
        yield studio


@pytest.fixture(scope="session")
def _redis_socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    program = shutil.which("redis-server")
    assert program is not None, "apt-get install redis-server"
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield socket
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def redis_url(_redis_socket: Path) -> str:
    """The address of a real Redis that is empty."""
    url = f"unix://{_redis_socket}"
    deadline = time.monotonic() + 20
    while True:
        try:
            Redis.from_url(url).flushall()
            return url
        except ConnectionError:
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.05)
