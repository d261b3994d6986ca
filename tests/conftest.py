"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parent.parent

# Of no example: on a busy machine any may take long. The default one, else CI would try the same examples every time.
settings.register_profile("yolonas", settings.get_profile("default"), deadline=None)
settings.load_profile("yolonas")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference vectors and data sets beside the checkout; tests that need it skip where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not (path / "vectors").is_dir():
        pytest.skip("needs the reference vectors and data sets in ../shared, which is not there")
    return path
