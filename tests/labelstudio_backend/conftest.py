"""Fixtures of the backend's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from real_label_studio import Studio, running


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One real Label Studio for all tests of a run: make a project of your own in it."""
    with running(tmp_path_factory.mktemp("label_studio")) as studio:
        yield studio
