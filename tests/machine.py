"""What tests need of the machine that they run on."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def missing(reason: str) -> NoReturn:
    """Skip the test for what is not installed; in CI, where nothing may be left out unseen, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; in CI nothing is left out")
    pytest.skip(reason)
