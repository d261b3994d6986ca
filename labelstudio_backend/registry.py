"""Immutable model versions of every project, with a `current` pointer that is replaced atomically.

    <root>/<project key>/project.json          hostname, "ID.timestamp", label config last seen; replaced atomically
    <root>/<project key>/versions/v0/          a start version: record.json names the start weights
    <root>/<project key>/versions/v1/          a trained version: record.json, model.safetensors, and where another
                                               runtime serves it the file that was exported for that (see `serving`)
    <root>/<project key>/current               {"version": 1}; replaced atomically

A person's choice is in `current` too: "pinned", and "over", the newest version that was there at the choice.

A version is written into a temporary folder, flushed to disk and renamed into place, so a kill or a full disk at any
moment leaves either no new version or a whole one, and the old version serving. Nothing is cached in memory: other
processes, and other machines that share the folder, may publish. Writers of a project take turns by a lock, held for
milliseconds; readers take none. What never changes again is a version, until `retain` leaves of it the record alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from labelstudio_backend.locks import locked, try_lock
from labelstudio_backend.settings import UNTRAINED
from labelstudio_backend.version import CHECKPOINT, RECORD, START, TRAINED, RegistryError, Version
from yolonas.atomic import atomic_file, sync_folder

_LOCK = ".lock"
_TEMPORARY = ".tmp-"


def normal_hostname(hostname: str) -> str:
    """Label Studio's address in one spelling: lower-case scheme and host, no trailing slash."""
    parts = urlsplit(hostname.strip())
    if not parts.netloc:
        return hostname.strip().rstrip("/").lower()
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def project_key(hostname: str, uid: str) -> str:
    """Folder name of a project: its ID, readable, and 6 hex digits of hostname + "ID.timestamp".

    Project IDs repeat after a reinstall of Label Studio, and over several Label Studios; the timestamp of creation and
    the hostname do not.
    """
    number = uid.partition(".")[0]
    if re.fullmatch(r"[0-9]{1,15}\.[0-9]{1,15}", uid) is None:
        raise ValueError(f'project is {uid[:40]!r}; Label Studio sends "ID.timestamp"')
    digest = hashlib.sha256((normal_hostname(hostname) + uid).encode()).hexdigest()[:6]
    return f"{number}-{digest}"


class Registry:
    """The projects below `root`, one folder each."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def register(self, hostname: str, uid: str, label_config: str | None = None) -> ProjectRegistry:
        """The project of this Label Studio, created when it is new; writes the label config if it changed."""
        project = ProjectRegistry(self.root, project_key(hostname, uid))
        if not project.exists() or project.metadata().get("uid") != uid:
            (project.path / "versions").mkdir(parents=True, exist_ok=True)
            sync_folder(self.root)
            project.update(hostname=normal_hostname(hostname), uid=uid, project_id=int(uid.partition(".")[0]))
        if label_config is not None and project.metadata().get("label_config") != label_config:
            project.update(label_config=label_config)
        return project

    def project(self, key: str) -> ProjectRegistry:
        """The project of this key; RegistryError when there is none."""
        project = ProjectRegistry(self.root, key)
        if "/" in key or key.startswith(".") or not project.exists():
            raise RegistryError(f"there is no project {key!r} in {self.root}; Label Studio makes it known by /setup")
        return project

    def projects(self) -> list[ProjectRegistry]:
        """All projects, by key."""
        if not self.root.is_dir():
            return []
        found = [ProjectRegistry(self.root, path.name) for path in sorted(self.root.iterdir()) if path.is_dir()]
        return [project for project in found if project.exists()]

    def find(self, uid: str) -> ProjectRegistry | None:
        """The project with this "ID.timestamp"; of several Label Studios that have one, the last seen.

        /predict and /webhook name no hostname.
        """
        prefix = uid.partition(".")[0] + "-"
        matches = [p for p in self.projects() if p.key.startswith(prefix) and p.metadata().get("uid") == uid]
        return max(matches, key=lambda project: project.seen_at(), default=None)

    def clean(self) -> list[Path]:
        """Remove what a killed publish or a full disk left behind; returns the removed paths. Call it at start."""
        removed = []
        for folder in self.root.iterdir() if self.root.is_dir() else ():
            if not folder.is_dir():
                continue
            with (
                contextlib.suppress(OSError),
                locked(folder / _LOCK),
            ):  # under it files are replaced, and temporary folders are made
                files = [path for path in folder.glob(".*.tmp") if path.is_file()]
                for path in files:
                    path.unlink()
                removed += files
                for path in folder.glob(f"versions/{_TEMPORARY}*"):
                    lock = try_lock(path / _LOCK)
                    if lock is not None:  # nobody is writing there
                        shutil.rmtree(path, ignore_errors=True)
                        os.close(lock)
                        removed.append(path)
        return removed


class ProjectRegistry:
    """Versions and metadata of one project. Any number of threads and processes may read; publishing is atomic."""

    def __init__(self, root: Path, key: str) -> None:
        self.key = key
        self.path = root / key

    def __repr__(self) -> str:
        return f"ProjectRegistry({self.key!r})"

    def exists(self) -> bool:
        return (self.path / "project.json").is_file()

    def metadata(self) -> dict[str, Any]:
        """`hostname`, `uid` ("ID.timestamp"), `project_id`, `label_config` (XML last seen) and what update() added."""
        try:
            text = (self.path / "project.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        return dict(json.loads(text))

    def update(self, **values: Any) -> dict[str, Any]:
        """Merge `values` (JSON) into the metadata, atomically; returns all of it."""
        with self._locked():
            metadata = {**self.metadata(), **values}
            _write_json(self.path / "project.json", metadata)
        return metadata

    @property
    def project_id(self) -> int:
        """Label Studio's ID of the project."""
        return int(self.key.partition("-")[0])

    @property
    def label_config(self) -> str | None:
        """The label config last seen, XML."""
        return self.metadata().get("label_config")

    def touch(self) -> None:
        """Note that Label Studio just spoke about this project (see Registry.find)."""
        os.utime(self.path / "project.json")

    def seen_at(self) -> float:
        try:
            return (self.path / "project.json").stat().st_mtime
        except FileNotFoundError:
            return 0.0

    # -- versions ----------------------------------------------------------------------------------------------

    def current(self) -> Version:
        """The version that serves; RegistryError before the first."""
        return self.version(int(self._pointer()["version"]))

    def pinned(self) -> bool:
        """Whether the current version stays whatever is trained."""
        return bool(self._pointer().get("pinned"))

    def _pointer(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / "current").read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise RegistryError(
                f"project {self.key} has no version yet; Label Studio's /setup makes the first"
            ) from None

    def version(self, number: int) -> Version:
        """Version `number`; RegistryError when there is none."""
        path = self.path / "versions" / f"v{number}"
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RegistryError(f"project {self.key} has no version v{number} in {path.parent}") from None
        return Version(f"yolonas-{self.key}-v{number}", number, self.key, path, record)

    def versions(self) -> list[Version]:
        """All versions, oldest first, with those whose files `retain` has removed."""
        return [self.version(number) for number in self._numbers()]

    def ensure_start(self, weights: str, labels: Sequence[str], tags: Mapping[str, str] | None = None) -> Version:
        """The current version, after making one that stands for the start weights where that is needed.

        It is needed when there is none yet, and when nothing was trained and the start weights changed, or `tags`, the
        names of control tags with weights of their own, or, for `untrained-n`, the labels (its classes are the
        project's labels); a version that a person chose stays. Nothing is loaded, copied or downloaded.
        """
        own = {name: {"weights": file, "stamp": _stamp(file)} for name, file in (tags or {}).items()}
        start: dict[str, Any] = {"kind": START, "weights": weights, "stamp": _stamp(weights), "tags": own}
        if weights == UNTRAINED:
            start["labels"] = list(labels)

        def fits() -> Version | None:
            with contextlib.suppress(RegistryError):
                version = self.current()
                known = {"tags": {}, **version.record}
                same = {key: known.get(key) for key in start} == start
                if version.trained or same or "over" in self._pointer():
                    return version
            return None

        if (version := fits()) is not None:
            return version
        with self._writing(), self._temporary() as folder, self._locked():
            # two /setup calls arrive when a backend is added
            return fits() or self._add(folder, start)

    def publish(
        self, checkpoint: Path, record: Mapping[str, Any], files: Sequence[Path] = (), *, base: int | None = None
    ) -> Version:
        """Copy a trained checkpoint into a new version and make it current, unless a person chose another; see below.

        `record` (JSON) is kept with it; keys `kind`, `number`, `parent` and `published` are set here. `files` are kept
        beside the checkpoint under their own names: what was exported from it. `base` is the number of the version that
        the training started from, by default the current one. Raises RegistryError, leaving the old version current,
        when something cannot be written. Returns the new version.

        It stays a candidate, for a person to choose, where the current version is pinned, or where a person rolled back
        while it was being trained from something else.
        """
        for file in (Path(checkpoint), *files):
            if not file.is_file():
                raise FileNotFoundError(f"no checkpoint to publish at {file}")
        with self._writing(), self._temporary() as folder:
            # before the lock: /setup must not wait for it
            for file, name in ((checkpoint, CHECKPOINT), *((file, file.name) for file in files)):
                shutil.copyfile(file, folder / name)
                _sync_file(folder / name)
            with self._locked():
                return self._add(folder, {**record, "kind": TRAINED}, base)

    def take_over(self, number: int) -> bool:
        """Make a published version current that its publisher was killed before it could; returns whether it is.

        A newer one, and what a person chose, stays.
        """
        with self._locked():
            current, version = self.current(), self.version(number)
            if number > current.number and self._may_serve(number, version.record["parent"]):
                current = self._activate(number)
        return current.number == number

    def _may_serve(self, number: int, base: int | None) -> bool:
        """Whether a trained version may become current without a person's word."""
        try:
            pointer = self._pointer()
        except RegistryError:
            return True
        if "over" not in pointer:
            return True
        return not pointer.get("pinned") and number > pointer["over"] and base == pointer["version"]

    # -- what a person chooses ---------------------------------------------------------------------------------

    def rollback(self, number: int) -> Version:
        """Have an existing version serve by a person's choice; RegistryError when there is none, or it was removed.

        The next training starts from it. What was trained from another, and ends only now, does not replace it.
        """
        return self._choose(number)

    def pin(self, number: int) -> Version:
        """As `rollback`; and what is trained from now on is published as a candidate, and does not serve."""
        return self._choose(number, pinned=True)

    def unpin(self) -> Version:
        """Let the next version that is trained from the current one serve again."""
        with self._locked():
            number = self.current().number
            return self._activate(number, over=self._numbers()[-1]) if self.pinned() else self.current()

    def _choose(self, number: int, **mark: Any) -> Version:
        with self._locked():
            version = self.version(number)
            if version.removed:
                raise RegistryError(
                    f"the files of {version.name} were removed, as YOLONAS_KEEP_VERSIONS newer ones are there; "
                    "choose another version"
                )
            return self._activate(number, over=self._numbers()[-1], **mark)

    def retain(self, keep: int) -> list[Version]:
        """Remove the files of the trained versions beyond the newest `keep`; returns what was removed. 0 keeps all.

        The current version, its parent and what a process uses (see `Version.in_use`) stay. A removed version's record
        stays, without its list of tasks, so that its number is never given again and it is still known.
        """
        if keep == 0:
            return []
        with self._locked():
            current = self.current()
            trained = [version for version in self.versions() if version.trained]
            gone = [version for version in trained if version.removed]
            kept = [version for version in trained if not version.removed]
            removed = []
            for version in kept[:-keep]:
                if version.number in (current.number, current.record["parent"]):
                    continue
                lock = try_lock(version.path / RECORD)
                if lock is None:
                    continue
                record = {name: value for name, value in version.record.items() if name != "manifest"}
                _write_json(version.path / RECORD, {**record, "removed": time.time()})
                os.close(lock)
                removed.append(self.version(version.number))
            for version in [*gone, *removed]:  # those of before, too: a kill may have come between
                for path in version.path.iterdir():
                    if path.name != RECORD:
                        path.unlink(missing_ok=True)
        return removed

    # -- writing -----------------------------------------------------------------------------------------------

    def _activate(self, number: int, **mark: Any) -> Version:
        version = self.version(number)
        _write_json(self.path / "current", {"version": number, **mark})
        return version

    def _numbers(self) -> list[int]:
        folder = self.path / "versions"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdecimal())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with locked(self.path / _LOCK):
            yield

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RegistryError(
                f"the new version of project {self.key} could not be written to {self.path / 'versions'} "
                f"({error.strerror or error}), so the old one goes on serving; free disk space or mend its permissions"
            ) from error

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        """A folder to make a version in, locked while it is in use, gone at the end unless `_add` moved it."""
        versions = self.path / "versions"
        with self._locked():
            versions.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=versions))
            lock = try_lock(folder / _LOCK)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)

    def _add(self, folder: Path, record: dict[str, Any], base: int | None = None) -> Version:
        """Make a version of the folder, and make it current where nobody minds; the caller holds the lock."""
        if base is None:
            with contextlib.suppress(RegistryError):
                base = self.current().number
        number = max(self._numbers(), default=-1) + 1
        record = {**record, "number": number, "parent": base, "published": time.time()}
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _sync_file(folder / RECORD)
        (folder / _LOCK).unlink(missing_ok=True)
        sync_folder(folder)
        folder.rename(self.path / "versions" / f"v{number}")
        sync_folder(self.path / "versions")
        return self._activate(number) if self._may_serve(number, base) else self.version(number)


def _stamp(weights: str) -> str | None:
    """Size and time of a start file, so that a file replaced in place becomes a version of its own."""
    try:
        status = Path(weights).stat()
    except OSError:
        return None
    return f"{status.st_size}-{status.st_mtime_ns}"


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=1).encode())
