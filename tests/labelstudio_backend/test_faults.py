"""No label is lost and no half version serves, whatever happens; the long form is `tests/bench/faults.py`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import labelling_day

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def day(tmp_path: Path) -> Iterator[labelling_day.Day]:
    with labelling_day.Day(tmp_path / "day", tasks=6) as day:
        yield day


def test_killed_at_some_points(day: labelling_day.Day) -> None:
    labelling_day.killed_at(day, ("re-prediction", "pulled", "publish, renamed"))


def test_killed_in_a_burst_of_webhooks(day: labelling_day.Day) -> None:
    assert labelling_day.killed_in_a_burst(day, 100, 1.0) < 60  # not the second that each event may take


def test_killed_at_random_moments(day: labelling_day.Day) -> None:
    labelling_day.killed_at_random(day, 3)


def test_a_full_disk(tmp_path: Path) -> None:
    """On a small file system, mounted where only this test sees it."""
    mounting = ["unshare", "--map-root-user", "--mount"]
    mount = [*mounting, "mount", "-t", "tmpfs", "tmpfs", tmp_path]
    if shutil.which("unshare") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("nobody may mount a file system here: a container needs user namespaces, or --cap-add SYS_ADMIN")
    command = [*mounting, sys.executable, labelling_day.__file__, tmp_path / "day", "1.0"]
    subprocess.run(command, check=True, timeout=500)


def test_label_studio_is_away(day: labelling_day.Day) -> None:
    labelling_day.away(day, 1.0)


def test_webhooks_come_twice_and_late(day: labelling_day.Day) -> None:
    labelling_day.doubled_and_delayed(day)


def test_the_label_config_changes_during_a_training(day: labelling_day.Day) -> None:
    labelling_day.config_changed(day)


def test_two_servers_at_once(day: labelling_day.Day) -> None:
    labelling_day.two_servers(day)
