"""A real Label Studio for tests: one for the whole run, a backend as a process, and Chromium."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from labelstudio_backend import local_label_studio
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.local_label_studio import Account, Process, free_port
from machine import CHROMIUM, missing

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page


@dataclass
class Studio:
    """A Label Studio that runs.

    token: a personal access token; client: calls with the legacy token; files: the folder that /data/local-files may
    serve, where a Local Files storage of the project covers it.
    """

    url: str
    account: Account
    token: str
    client: LabelStudio
    files: Path

    def log_in(self, page: Page) -> None:
        """As a person does."""
        page.goto(f"{self.url}/user/login/")
        page.fill("input[name=email]", self.account.email)
        page.fill("input[name=password]", self.account.password)
        page.click("button[type=submit]")
        page.wait_for_load_state("load")


@contextmanager
def running(folder: Path) -> Iterator[Studio]:
    """A new Label Studio with its data in `folder`, until the block ends."""
    account, port = Account.of(folder), free_port()
    url, files = f"http://127.0.0.1:{port}", folder / "files"
    files.mkdir()
    process = local_label_studio.start(folder / "studio", port, account, local_files=files)
    try:
        with LabelStudio(url, account.token) as client:
            yield Studio(url, account, personal_access_token(url, account), client, files)
    finally:
        process.stop()


def personal_access_token(url: str, account: Account) -> str:
    """What a person copies from Account & Settings; Label Studio shows it once."""
    with httpx.Client(base_url=url, follow_redirects=False) as session:
        session.get("/user/login/")
        form = {
            "email": account.email,
            "password": account.password,
            "csrfmiddlewaretoken": session.cookies["csrftoken"],
        }
        assert session.post("/user/login/", data=form, headers={"Referer": f"{url}/user/login/"}).status_code == 302
        answer = session.post("/api/token/", headers={"X-CSRFToken": session.cookies["csrftoken"], "Referer": url})
        return str(answer.raise_for_status().json()["token"])


def start_backend(environment: dict[str, str], log: Path) -> Process:
    """`yolonas-labelstudio serve` with these settings; the caller waits for its /health."""
    command = [sys.executable, "-m", "labelstudio_backend.cli", "serve"]
    return Process("The backend", command, os.environ | environment, log)


def wait(condition: Callable[[], bool], seconds: float = 60.0, what: str = "what was waited for") -> None:
    """Until the condition holds: soon after it does, and without asking a Label Studio all the time."""
    deadline, pause = time.monotonic() + seconds, 0.01
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(pause)
        pause = min(1.5 * pause, 0.5)


@contextmanager
def browser(folder: Path, *, scale: int = 1, width: int = 1400, height: int = 900) -> Iterator[BrowserContext]:
    """Headless Chromium with its profile in `folder`, which reaches nothing but this machine; skips without one."""
    if CHROMIUM is None:
        missing("needs Chromium (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    hosts = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = "--disable-component-update --disable-sync --disable-dev-shm-usage"
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(folder),
            executable_path=CHROMIUM,
            headless=True,
            args=[*flags.split(), *more.split(), hosts],
            viewport={"width": width, "height": height},
            device_scale_factor=scale,
        )
        context.set_default_timeout(60_000)
        yield context
        context.close()
