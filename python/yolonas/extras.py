"""Optional packages: imported where they are used, and named with their install line where they are missing."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from yolonas.errors import MissingPackageError


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
