"""Files in a folder of bounded size, for several threads and processes at a time."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

PROTECTED = 32
"""So many files, the newest, are left alone ..."""
PROTECT_SECONDS = 60.0
"""... for so long: they are about to be read."""
_TEMPORARY = ".tmp-"
_LEFT_OVER_SECONDS = 3600.0


class FileCache:
    """Content by key, in files, of which the least recently used goes first.

    A file appears whole or not at all. How much the folder holds stands in `.lock`, which is locked for a change, so
    that all processes together keep to the bound: `max_bytes`, or where that is less, the `PROTECTED` newest files.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._counted = False

    def path(self, key: str) -> Path:
        """Where the content of this key is, if it is there."""
        digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()
        return self.folder / digest[:2] / digest

    def get(self, key: str) -> Path | None:
        """The file of this key, which counts as used now."""
        path = self.path(key)
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def put(self, key: str, content: bytes | bytearray) -> Path:
        """Keep this content; raises OSError."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(content)
            with self._counter() as counter:
                # counted before it is there: who is killed in between leaves too high a count, which is mended
                total = _read(counter)
                if total is None or not self._counted or total + len(content) > self._max_bytes:
                    total = self._evict(len(content))
                    self._counted = True
                _write(counter, total + len(content) - _size(path))
                temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return path

    def drop(self, key: str) -> None:
        """Forget what this key has."""
        path = self.path(key)
        if not path.exists():
            return
        with self._counter() as counter:
            size, total = _size(path), _read(counter)
            path.unlink(missing_ok=True)
            if total is not None:
                _write(counter, total - size)

    def size(self) -> int:
        """Bytes of all files, as they were last counted."""
        try:
            text = (self.folder / ".lock").read_text()
        except FileNotFoundError:
            return 0
        return int(text) if text.strip().isdigit() else 0

    @contextlib.contextmanager
    def _counter(self) -> Iterator[int]:
        """The descriptor of the locked counter."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)

    def _evict(self, needed: int) -> int:
        """Make room for `needed` bytes where there is none, and a tenth of the bound more; returns what is left."""
        now, files, total = time.time(), [], 0
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # dropped, or renamed, meanwhile
            if not path.name.startswith(_TEMPORARY):
                files.append((status.st_mtime, status.st_size, path))
                total += status.st_size
            elif now - status.st_mtime > _LEFT_OVER_SECONDS:
                path.unlink(missing_ok=True)  # of a killed process
        if total + needed <= self._max_bytes:
            return total
        files.sort()
        for number, (used, size, path) in enumerate(files):
            newest = len(files) - number < PROTECTED and now - used < PROTECT_SECONDS
            if newest or total + needed <= 0.9 * self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0)
    return int(text) if text.strip().isdigit() else None


def _write(descriptor: int, total: int) -> None:
    os.pwrite(descriptor, b"%-31d\n" % max(total, 0), 0)
