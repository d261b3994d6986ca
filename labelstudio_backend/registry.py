"""Immutable model versions of every project, with a `current` pointer that is replaced atomically.

    <root>/<project key>/project.json          hostname, "ID.timestamp", label config last seen; replaced atomically
    <root>/<project key>/versions/v0/          a start version: record.json names the start weights
    <root>/<project key>/versions/v1/          a trained version: record.json, model.safetensors, and where another
                                               runtime serves it the file that was exported for that (see `serving`)
    <root>/<project key>/current               {"version": 1}; replaced atomically

A version is written into a temporary folder, flushed to disk and renamed into place, so a kill or a full disk at any
moment leaves either no new version or a whole one, and the old version serving. Nothing is cached in memory: other
processes may publish. Writers of a project take turns by a lock, held for milliseconds; readers take none.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from labelstudio_backend.settings import UNTRAINED
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

CHECKPOINT = "model.safetensors"
RECORD = "record.json"
START, TRAINED = "start", "trained"
PUBLISHED = "yolo_nas_s_coco"
_TEMPORARY = ".tmp-"
_STALE_SECONDS = 3600.0  # a publish takes seconds; a younger folder may belong to a process that is still writing


class RegistryError(YolonasError):
    """A project or version that is not there, or a registry that cannot be written."""


@dataclass(frozen=True)
class Version:
    """One immutable version of one project's model; `name` is what Label Studio knows as `model_version`."""

    name: str
    number: int
    project_key: str
    path: Path
    record: dict[str, Any] = field(compare=False, hash=False)

    @property
    def trained(self) -> bool:
        """Whether it was trained in the project, so that its class names are the project's labels."""
        return bool(self.record["kind"] == TRAINED)

    @property
    def weights(self) -> str:
        """A trained version's own checkpoint file; a start version's file, published name or `untrained-n`."""
        return str(self.path / CHECKPOINT) if self.trained else str(self.record["weights"])

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes of a version whose classes are the project's labels; None where its record has none."""
        labels = self.record.get("labels")
        return None if labels is None else tuple(labels)


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
            _sync_folder(self.root)
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
        """Remove what a killed publish or a full disk left behind; returns the removed folders. Call it at start."""
        removed = []
        for leftover in [*self.root.glob(f"*/{_TEMPORARY}*"), *self.root.glob(f"*/versions/{_TEMPORARY}*")]:
            if not _in_use(leftover):
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
                removed.append(leftover)
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
        with _locked(self.path):
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
        try:
            number = int(json.loads((self.path / "current").read_text(encoding="utf-8"))["version"])
        except FileNotFoundError:
            raise RegistryError(
                f"project {self.key} has no version yet; Label Studio's /setup makes the first"
            ) from None
        return self.version(number)

    def version(self, number: int) -> Version:
        """Version `number`; RegistryError when there is none."""
        path = self.path / "versions" / f"v{number}"
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RegistryError(f"project {self.key} has no version v{number} in {path.parent}") from None
        return Version(f"yolonas-{self.key}-v{number}", number, self.key, path, record)

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        return [self.version(number) for number in self._numbers()]

    def ensure_start(self, weights: str, labels: Sequence[str], tags: Mapping[str, str] | None = None) -> Version:
        """The current version, after making one that stands for the start weights where that is needed.

        It is needed when there is none yet, and when nothing was trained and the start weights changed, or `tags`, the
        names of control tags with weights of their own, or, for `untrained-n`, the labels (its classes are the
        project's labels). Nothing is loaded, copied or downloaded.
        """
        own = {name: {"weights": file, "stamp": _stamp(file)} for name, file in (tags or {}).items()}
        start: dict[str, Any] = {"kind": START, "weights": weights, "stamp": _stamp(weights), "tags": own}
        if weights == UNTRAINED:
            start["labels"] = list(labels)
        with self._writing(), _locked(self.path):  # two /setup calls arrive when a backend is added
            with contextlib.suppress(RegistryError):
                version = self.current()
                known = {"tags": {}, **version.record}
                if version.trained or {key: known.get(key) for key in start} == start:
                    return version
            with self._temporary() as folder:
                return self._add(folder, start)

    def publish(self, checkpoint: Path, record: Mapping[str, Any], files: Sequence[Path] = ()) -> Version:
        """Copy a trained checkpoint into a new version and make it current.

        `record` (JSON) is kept with it; keys `kind`, `number`, `parent` and `published` are set here. `files` are kept
        beside the checkpoint under their own names: what was exported from it. Raises RegistryError, leaving the old
        version current, when something cannot be written. Returns the new version.
        """
        for file in (Path(checkpoint), *files):
            if not file.is_file():
                raise FileNotFoundError(f"no checkpoint to publish at {file}")
        with self._writing(), self._temporary() as folder:
            # before the lock: /setup must not wait for it
            for file, name in ((checkpoint, CHECKPOINT), *((file, file.name) for file in files)):
                shutil.copyfile(file, folder / name)
                _sync_file(folder / name)
            with _locked(self.path):
                return self._add(folder, {**record, "kind": TRAINED})

    def activate(self, number: int) -> Version:
        """Make an existing version current; RegistryError when there is none."""
        with _locked(self.path):
            return self._activate(number)

    def _activate(self, number: int) -> Version:
        version = self.version(number)
        _write_json(self.path / "current", {"version": number})
        return version

    def _numbers(self) -> list[int]:
        folder = self.path / "versions"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdecimal())

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
        """A folder to make a version in, gone at the end unless `_add` moved it into place."""
        versions = self.path / "versions"
        versions.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=versions))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _add(self, folder: Path, record: dict[str, Any]) -> Version:
        """Make a version of the folder and make it current; the caller holds the lock."""
        try:
            parent: int | None = self.current().number
        except RegistryError:
            parent = None
        number = max(self._numbers(), default=-1) + 1
        record = {**record, "number": number, "parent": parent, "published": time.time()}
        (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        _sync_file(folder / RECORD)
        _sync_folder(folder)
        folder.rename(self.path / "versions" / f"v{number}")
        _sync_folder(self.path / "versions")
        return self._activate(number)


def load_checkpoint(version: Version) -> Checkpoint:
    """The model of a version; may download published weights, so never call it from a request that must be quick.

    `untrained-n` is drawn anew with a fixed seed, so it is the same model each time.
    """
    from yolonas import checkpoint, weights

    if version.weights != UNTRAINED:
        return checkpoint.load(version.weights if version.trained else weights.resolve(version.weights))
    import torch

    from yolonas.model import YoloNAS

    labels = version.record["labels"] or ["object"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = YoloNAS("n", num_classes=len(labels), class_names=labels).eval()
    return checkpoint.Checkpoint(model=model, record={"start": UNTRAINED})


def class_names(version: Version) -> tuple[str, ...]:
    """The classes of a version, without a download; raises YolonasError for a file that cannot be read."""
    if version.labels is not None:
        return version.labels
    if not version.trained and version.record.get("stamp") is None:  # no file
        from yolonas.model.config import COCO_NAMES

        return COCO_NAMES  # what is published is trained on COCO
    from yolonas import checkpoint

    return checkpoint.load(version.weights).model.class_names


def choose_weights(wanted: str) -> tuple[str, str]:
    """What new projects start from -> the value to serve with, and a sentence that says so.

    `auto` is yolo_nas_s_coco where it can be had, else `untrained-n`; a file becomes its absolute path. May download.
    Raises WeightsError or FileNotFoundError for weights that were asked for and cannot be had.
    """
    from yolonas import weights

    if wanted == UNTRAINED:
        return UNTRAINED, "an untrained model (variant n): it knows nothing until it has learned from your first labels"
    if Path(wanted).is_file():
        return str(Path(wanted).resolve()), f"the checkpoint {wanted}"
    name = PUBLISHED if wanted == "auto" else wanted
    try:
        return name, f"the weights {name} ({weights.resolve(name)})"
    except YolonasError as error:
        if wanted != "auto":
            raise
        sentence = "an untrained model (variant n), which learns from your first labels"
        return UNTRAINED, f"{sentence}, because no published weights can be had ({error})"


# -- files -----------------------------------------------------------------------------------------------------


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


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    """Replace the file atomically: readers see the old text or the new one, also after a power cut."""
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        _sync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _in_use(leftover: Path) -> bool:
    """Whether the process in the name may still be writing: it lives, and the file is young."""
    process = leftover.name.removeprefix(_TEMPORARY).partition("-")[0]
    try:
        young = time.time() - leftover.stat().st_mtime < _STALE_SECONDS
        if not young or not process.isdecimal() or int(process) == os.getpid():
            return False
        os.kill(int(process), 0)
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer of a project at a time, over threads and processes; not to be taken twice by one."""
    with (path / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
