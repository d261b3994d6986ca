"""The versions of one project: which one serves, publishing, a person's choices, retention. See `registry`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from labelstudio_backend.locks import locked, try_lock
from labelstudio_backend.settings import UNTRAINED
from labelstudio_backend.version import CHECKPOINT, RECORD, START, TRAINED, MissingVersionError, RegistryError, Version
from yolonas.atomic import atomic_file, sync_folder

_LOCK = ".lock"
_TEMPORARY = ".tmp-"


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
        """`hostname`, `uid` ("ID.timestamp"), `project_id`, `label_config` (XML last seen) and what update() added.

        RegistryError where they cannot be read.
        """
        try:
            return _read_json(
                self.path / "project.json",
                "or delete it and open the project's model page in Label Studio, which has it written anew",
            )
        except FileNotFoundError:
            return {}

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

    def told(self) -> str | None:
        """Name of the version that Label Studio was last told of, by whichever server."""
        return self.metadata().get("told")

    def tell(self, version: Version) -> None:
        """Note that Label Studio is told of this version now."""
        if self.told() != version.name:
            self.update(told=version.name)

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
        """The version that serves; MissingVersionError before the first, RegistryError where it cannot be read."""
        return self.version(self.current_number())

    def current_number(self) -> int:
        """The number of the version that serves; raises as `current`."""
        return int(self._pointer()["version"])

    def pinned(self) -> bool:
        """Whether the current version stays whatever is trained."""
        return bool(self._pointer().get("pinned"))

    def _pointer(self) -> dict[str, Any]:
        try:
            return _read_json(self.path / "current", f"or say which version serves: {self._rollback()}")
        except FileNotFoundError:
            raise MissingVersionError(
                f"project {self.key} has no version yet; Label Studio's /setup makes the first"
            ) from None

    def version(self, number: int) -> Version:
        """Version `number`; MissingVersionError when there is none, RegistryError where it cannot be read."""
        path = self.path / "versions" / f"v{number}"
        try:
            record = _read_json(path / RECORD, f"and if v{number} serves, have another one serve: {self._rollback()}")
        except FileNotFoundError:
            raise MissingVersionError(f"project {self.key} has no version v{number} in {path.parent}") from None
        return Version(self._name(number), number, self.key, path, record)

    def _rollback(self) -> str:
        return f"yolonas-labelstudio versions --project {self.key} rollback NUMBER"

    def origin(self) -> tuple[str, str]:
        """`uid` ("ID.timestamp") and `hostname`, as which Label Studio named itself at /setup; "" where not known."""
        metadata = self.metadata()
        return str(metadata.get("uid", "")), str(metadata.get("hostname", ""))

    def names(self) -> list[str]:
        """The names of all versions, oldest first, without reading their records."""
        return [self._name(number) for number in self._numbers()]

    def _name(self, number: int) -> str:
        return f"yolonas-{self.key}-v{number}"

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
            with contextlib.suppress(MissingVersionError):
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

    def made_by(self, job: int, since: float) -> Version | None:
        """The version that a training job published after `since`, when the job was queued (Unix seconds).

        Numbers of jobs repeat where a queue was lost.
        """
        versions = self.versions()
        return next((v for v in versions if v.record.get("job") == job and v.record["published"] >= since), None)

    def _may_serve(self, number: int, base: int | None) -> bool:
        """Whether a trained version may become current without a person's word."""
        try:
            pointer = self._pointer()
        except MissingVersionError:
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
        with self._writing(), self._locked():
            number = self.current().number
            return self._activate(number, over=self._numbers()[-1]) if self.pinned() else self.current()

    def _choose(self, number: int, **mark: Any) -> Version:
        with self._writing(), self._locked():
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
                try:
                    record = {name: value for name, value in version.record.items() if name != "manifest"}
                    _write_json(version.path / RECORD, {**record, "removed": time.time()})
                finally:
                    os.close(lock)
                removed.append(self.version(version.number))
            for version in [*gone, *removed]:  # those of before, too: a kill may have come between
                for path in version.path.iterdir():
                    if path.name != RECORD:
                        path.unlink(missing_ok=True)
        return removed

    def clean(self) -> list[Path]:
        """Remove what killed writers left; returns the removed paths."""
        with self._locked():  # files are replaced under it, and temporary folders made
            removed = [path for path in self.path.glob(".*.tmp") if path.is_file()]
            for path in removed:
                path.unlink()
            for path in self.path.glob(f"versions/{_TEMPORARY}*"):
                lock = try_lock(path / _LOCK)
                if lock is not None:  # nobody is writing there
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)
                    removed.append(path)
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
                f"the versions of project {self.key} could not be written to {self.path} ({error.strerror or error}), "
                "so the one that served goes on serving; free disk space or mend its permissions"
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
            with contextlib.suppress(MissingVersionError):
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


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    """What `_write_json` wrote; FileNotFoundError where nothing is there, RegistryError where it cannot be read."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or "it is damaged"
        raise RegistryError(f"{path} cannot be read ({reason}): restore it from a backup, {remedy}") from error


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        stream.write(json.dumps(value, indent=1).encode())
