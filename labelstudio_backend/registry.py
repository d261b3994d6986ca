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
import re
from pathlib import Path
from urllib.parse import urlsplit

from labelstudio_backend.project_registry import ProjectRegistry as ProjectRegistry
from labelstudio_backend.version import RegistryError
from yolonas.atomic import sync_folder


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
        folders = [path for path in self.root.iterdir() if path.is_dir()] if self.root.is_dir() else []
        removed = []
        for path in folders:
            with contextlib.suppress(OSError):  # a full disk is no reason not to start
                removed += ProjectRegistry(self.root, path.name).clean()
        return removed
