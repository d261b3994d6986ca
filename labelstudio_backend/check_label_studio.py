"""The checks of Label Studio itself: whether it answers, takes the token, and has the project."""

from __future__ import annotations

import re
from collections.abc import Generator
from datetime import UTC, datetime
from typing import Any

from labelstudio_backend.check import Case, Check, counted, failed
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import LabelStudioError, jwt_payload

TESTED = (1, 23)  # of Label Studio


def label_studio(case: Case) -> Generator[Check, None, bool]:
    """Whether it answers, and is of a version that is known."""
    name = "Label Studio"
    if not case.settings.label_studio_url:
        yield Check(name, "FAIL", "its address is not set", "set YOLONAS_LABEL_STUDIO_URL")
        return False
    try:
        url, transport = case.settings.label_studio_url, case.transport
        with LabelStudio(url, None, read_seconds=30.0, retries=1, transport=transport) as anybody:
            version = anybody.version()
    except LabelStudioError as error:
        yield failed(name, error)
        return False
    text = f"{version or 'of an unknown version'} at {case.settings.label_studio_url}"
    if _numbers(version) < TESTED:
        older = f"yolonas is tested with {'.'.join(map(str, TESTED))}: update if something does not work"
        yield Check(name, "WARN", text, older)
    else:
        yield Check(name, "OK", text)
    return True


def token(case: Case) -> Generator[Check, None, bool]:
    """Whether one is set that lets us in."""
    name, token = "Token", case.settings.token or ""
    make = "make a personal access token under Account & Settings, and set YOLONAS_LABEL_STUDIO_TOKEN"
    payload = jwt_payload(token)
    expires = payload.get("exp")
    problem = ""
    if not token:
        problem = "none is set, so there is no access to images and annotations"
    elif payload.get("token_type") == "access":
        problem = "it is an access token, which lives for five minutes"
    elif isinstance(expires, int | float) and expires < datetime.now(UTC).timestamp():
        problem = f"the personal access token expired on {datetime.fromtimestamp(expires, UTC):%Y-%m-%d}"
    elif not payload and not re.fullmatch(r"[0-9a-f]{40}", token):
        problem = "it is neither a personal access token nor a legacy token (40 hexadecimal digits)"
    if problem:
        yield Check(name, "FAIL", problem, make)
        return False
    kind = "personal access token" if payload else "legacy token"
    try:
        user = case.client.user()
    except LabelStudioError as error:
        if error.status == 401:
            text = f"Label Studio refuses the {kind}" + ("" if payload else " (they are off unless switched on)")
            yield Check(name, "FAIL", text, make)
        else:
            yield failed(name, error)
        return False
    yield Check(name, "OK", f"{kind} of {user}")
    return True


def project(case: Case) -> Generator[Check, None, dict[str, Any] | None]:
    """Whether the token sees it; Label Studio's state of it then."""
    try:
        state = case.client.get_project(case.project)
    except LabelStudioError as error:
        yield failed("Project", error)
        return None
    labelled = state.get("num_tasks_with_annotations", 0)
    yield Check(
        "Project", "OK", f"{state.get('title')!r}, {counted(state['task_number'], 'task')}, {labelled} labelled"
    )
    return state


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
