"""Optional packages: imported where they are used, and named with their install line where they are missing."""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType
from typing import Any

from yolonas.errors import MissingPackageError


def openvino_core() -> Any:
    """The one openvino.Core of this process, which is never destroyed.

    Each Core of OpenVINO 2026.4 puts a signal stack of its own into the thread that makes it, and the one from before
    back when it is destroyed. Of several the last one back is freed memory: the next signal with a handler, such as the
    SIGCHLD of torch's DataLoader, then kills the process by SIGSEGV.
    """
    return _core(require("openvino", "openvino", "runtime 'openvino'"))


@functools.cache
def _core(openvino: ModuleType) -> Any:
    return openvino.Core()


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """The module `package`; MissingPackageError says what `purpose` it is needed for and which `extra` installs it."""
    # Read by OpenVINO and NNCF when they are imported; nothing here reports home.
    os.environ.setdefault("NNCF_TELEMETRY_DISABLE", "1")
    os.environ.setdefault("OPENVINO_TELEMETRY_DISABLE", "1")
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package {error.name}, which is not installed: pip install 'yolonas[{extra}]'"
        ) from error
