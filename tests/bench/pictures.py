"""Makes the pictures of the READMEs: runs `yolonas-labelstudio up` in a new folder and photographs the loop.

    python tests/bench/pictures.py labelstudio_backend/pictures
    python tests/bench/pictures.py labelstudio_backend/pictures dashboard    # that one alone

The sample project is drawn by the program, so no photograph is in it. Some eight minutes on two cores. The dashboard is
that of the tests, with a made-up history: seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from labelstudio_backend.client import LabelStudio
from labelstudio_backend.local_label_studio import Account

CHROMIUM_FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
]


def main(pictures: Path, only: str = "") -> None:
    pictures.mkdir(parents=True, exist_ok=True)
    dashboard(pictures / "dashboard.png")
    if only != "dashboard":
        loop(pictures)


def dashboard(picture: Path) -> None:
    sys.path.append(str(Path(__file__).parents[1]))
    from dashboard_state import backend
    from real_label_studio import browser

    with (
        tempfile.TemporaryDirectory() as name,
        backend(Path(name) / "state", title="Blood cells", label="Parasite") as served,
        browser(Path(name) / "chromium", width=1000, height=1000) as chromium,
    ):
        job = served.jobs.enqueue(served.key, "START_TRAINING")
        served.jobs.claim()
        curve = [  # as a training measures: AP50 of some epochs
            {"epoch": epoch, "loss": 3 / epoch} | ({} if epoch % 4 else {"ap50": 0.84 - 1.2 / epoch})
            for epoch in range(1, 23)
        ]
        served.jobs.report(job, progress=0.6, reason="training: epoch 22", epoch=22, seconds_left=80.0, curve=curve)
        page = chromium.new_page()
        page.goto(served.url)
        page.get_by_role("article", name=f"Training {job}").wait_for()
        page.get_by_role("region", name="Work by round").wait_for()  # what comes last
        page.screenshot(path=str(picture))


def loop(pictures: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        up = subprocess.Popen(
            [sys.executable, "-m", "labelstudio_backend.cli", "up", "--dir", str(folder), "--no-browser"]
        )
        try:
            photograph(folder, pictures)
        finally:
            up.terminate()
            up.wait(90)


def photograph(folder: Path, pictures: Path) -> None:
    account = Account.of(folder)
    state = wait(lambda: read_state(folder), "the sample project")
    url, project = f"http://127.0.0.1:{state['port']}", state["project"]
    with LabelStudio(url, account.token) as client, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 760})
        page.set_default_timeout(90_000)
        page.goto(f"{url}/user/login/")
        page.fill("input[name=email]", account.email)
        page.fill("input[name=password]", account.password)
        page.click("button[type=submit]")
        page.wait_for_load_state("load")
        task = min(task["id"] for task in client.iter_tasks(project))  # the first ones are not labelled
        for version in ("v1", "v2"):
            wait(partial(predicted, client, project, version), f"predictions of {version}")
            page.goto(f"{url}/projects/{project}/data?task={task}")
            page.wait_for_selector("canvas")
            page.wait_for_timeout(5000)
            page.screenshot(path=str(pictures / f"task-{version}.png"))
            if version == "v1":
                client.train(client.ml_backends(project)[0]["id"])
        browser.close()


def read_state(folder: Path) -> dict[str, int] | None:
    path = folder / "up.json"
    state = json.loads(path.read_text()) if path.exists() else {}
    return state if "project" in state else None


def predicted(client: LabelStudio, project: int, version: str) -> bool:
    counts = client.model_versions(project)
    tasks = client.get_project(project)["task_number"]
    return any(name.endswith(f"-{version}") and count >= tasks for name, count in counts.items())


def wait(answer: Callable[[], Any], what: str, seconds: float = 900) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := answer():
            return value
        time.sleep(1)
    raise TimeoutError(f"{what} did not come in {seconds:g} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
