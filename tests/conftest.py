"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference vectors and data sets beside the checkout; tests that need it skip where it is absent."""
    path = REPOSITORY.parent / "shared"
    if not (path / "vectors").is_dir():
        pytest.skip("needs the reference vectors and data sets in ../shared, which is not there")
    return path
