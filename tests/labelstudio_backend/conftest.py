"""Fixtures of the backend's tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from redis import Redis

import real_redis
from labelstudio_backend.settings import Settings
from machine import missing
from real_label_studio import Studio, running

# Settings of who runs the tests; the two are the tests' own.
for _name in [name for name in os.environ if name.startswith("YOLONAS_")]:
    if _name not in ("YOLONAS_LABEL_STUDIO_ML_2", "YOLONAS_SCREENSHOTS"):
        del os.environ[_name]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command sets in the environment ends with the test."""
    for name in Settings.model_fields:
        monkeypatch.setenv(f"YOLONAS_{name.upper()}", "")  # so that there is something to undo
        monkeypatch.delenv(f"YOLONAS_{name.upper()}")


@pytest.fixture(scope="session")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """One real Label Studio for all tests of a run: make a project of your own in it."""
    with running(tmp_path_factory.mktemp("label_studio")) as studio:
        yield studio


@pytest.fixture(scope="session")
def _redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        missing("redis-server is not installed")
    with real_redis.running(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture
def redis_url(_redis: str) -> str:
    """The address of a real Redis that is empty."""
    Redis.from_url(_redis).flushall()
    return _redis
