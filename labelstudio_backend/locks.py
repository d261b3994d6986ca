"""Locks on files: held by a process for as long as it lives, whatever ends it, which a PID cannot tell.

`flock`, so they hold between machines too where the file system passes them on: NFS 4, CephFS, Lustre (`-o flock`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the exclusive lock on the file `path`, which is made if need be; not to be taken twice by one thread."""
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> int | None:
    """The descriptor of an exclusive lock on the file `path`, or `None` where another holds it; close it to let go."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Share the lock on the file `path` with other users of what it stands for; no lock where it cannot be written."""
    try:
        stream = path.open("a+")
    except OSError:
        yield
        return
    with stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        yield
