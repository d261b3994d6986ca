"""Exported networks of checkpoints that other runtimes than torch run, kept from one process to the next."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from yolonas import __version__
from yolonas.errors import ExportError
from yolonas.weights import cache_folder

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint

MOST_FILES = 8  # of 9 MB (n) to 170 MB (l)

log = logging.getLogger(__name__)


def exported(checkpoint: Checkpoint) -> Path:
    """The checkpoint's raw network as an .onnx file, exported (5 to 15 s) where it was not before.

    Files are named by the SHA-256 of the weights, the manifest and the version of yolonas, and lie in
    $XDG_CACHE_HOME/yolonas/exported, by default under ~/.cache; of more than `MOST_FILES` those unused for the longest
    are deleted. Raises ExportError where the folder cannot be written, MissingPackageError without onnx and onnxscript.
    """
    from yolonas.export import export_raw_onnx

    path = folder() / f"{key(checkpoint)}.onnx"
    try:
        if path.is_file():
            with contextlib.suppress(OSError):  # of another user, for instance: then it only seems older than it is
                os.utime(path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        export_raw_onnx(checkpoint, path)
    except OSError as error:
        raise ExportError(
            f"the exported network cannot be written to {path.parent} ({error.strerror or error}): "
            "set XDG_CACHE_HOME to a folder that can be written, or export the checkpoint with `yolonas export`"
        ) from error
    log.info("exported the network to %s in %.0f s", path, time.perf_counter() - start)
    _prune(path)
    return path


def folder() -> Path:
    return cache_folder().with_name("exported")


def key(checkpoint: Checkpoint) -> str:
    """The SHA-256 of all that an exported file depends on."""
    from yolonas.export import manifest_of

    digest = hashlib.sha256(f"{__version__}\n{manifest_of(checkpoint).to_json()}\n".encode())
    for name, tensor in sorted(checkpoint.model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _prune(newest: Path) -> None:
    """Delete the files that were not used for the longest; who has one loaded keeps it."""
    with contextlib.suppress(OSError):
        files = sorted(newest.parent.glob("*.onnx"), key=lambda file: file.stat().st_mtime, reverse=True)
        for file in [f for f in files if f != newest][MOST_FILES - 1 :]:
            file.unlink(missing_ok=True)
