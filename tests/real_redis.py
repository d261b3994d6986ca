"""A real Redis for tests, on a socket in a folder."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from redis import Redis
from redis.exceptions import ConnectionError


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """The address of a Redis that answers, and keeps nothing afterwards; the path of `folder` has to be short."""
    program = shutil.which("redis-server")
    assert program is not None, "apt-get install redis-server"
    socket = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url = f"unix://{socket}"
        deadline = time.monotonic() + 60
        while not _answers(url):
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.05)
        yield url
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        return bool(Redis.from_url(url).ping())
    except ConnectionError:
        return False
