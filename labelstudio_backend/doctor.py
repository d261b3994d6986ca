"""`yolonas-labelstudio doctor`: looks at everything between Label Studio and this backend, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from typing import Any

import click
import httpx

from labelstudio_backend import check_backend, check_files, check_label_studio, check_predictions
from labelstudio_backend.backend import Backend
from labelstudio_backend.check import Case, Check, counted, failed
from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.options import backend_url, project_options
from labelstudio_backend.settings import Settings
from yolonas.errors import YolonasError

COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}


@click.command()
@project_options
@click.option("--url", callback=backend_url, help="The backend's address in Label Studio.  [default: that of yolonas]")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of the checks, for programs.")
def doctor(project: int, url: str | None, as_json: bool, **options: Any) -> None:
    """Check the connection of a Label Studio project to this backend, and say what to do about what is wrong.

    Run it where the backend runs, with its environment. It changes nothing, but has Label Studio save the webhook, and
    the backend where that is unreachable, as they are: that is how it tells what it thinks of their addresses. So the
    token needs the right to do that. The exit code is 1 where a check fails.
    """
    settings = settings_from(**options)
    checks = []
    for check in examine(settings, project, url):
        checks.append(check)
        if not as_json:
            click.echo(f"{click.style(f'{check.state:5}', COLOURS[check.state])} {check.name:15} {check.text}")
            if check.advice:
                click.echo(f"{'':21} -> {check.advice}")
    if as_json:
        click.echo(json.dumps([asdict(check) for check in checks], ensure_ascii=False, indent=1))
    failures, warnings = (sum(check.state == state for check in checks) for state in ("FAIL", "WARN"))
    if not as_json:
        click.echo(f"\n{counted(failures, 'failure')}, {counted(warnings, 'warning')}.")
    if failures:
        raise click.exceptions.Exit(1)


def examine(
    settings: Settings, project: int, url: str | None = None, *, transport: httpx.BaseTransport | None = None
) -> Iterator[Check]:
    """The checks of one project's connection, one by one as they are made.

    Args:
        settings: those of the backend.
        project: the project's ID.
        url: the backend's address as Label Studio has it; by default that of the project's yolonas backend.
        transport: in place of the network.
    """
    with LabelStudio(
        settings.label_studio_url, settings.token, read_seconds=30.0, retries=1, transport=transport
    ) as client:
        yield from _checks(Case(settings, client, project, url, transport))


def _checks(case: Case) -> Iterator[Check]:
    """All checks, as far as what they rest on is there; one that Label Studio does not let us make is a failed one."""
    if (yield from check_label_studio.label_studio(case)) and (yield from check_label_studio.token(case)):
        state = yield from check_label_studio.project(case)
        if state is not None:
            row = yield from _caught("Backend", check_backend.backend_row(case))
            if row is not None:
                with Backend(str(case.url), case.credentials, transport=case.transport) as backend:
                    here = bool((yield from _caught("Address", check_backend.address(case, row, backend))))
                    if here:
                        yield from _caught("Password", check_backend.password(case, row, backend))
                    yield from _caught("Webhook", check_backend.webhooks(case, backend, here))
                    yield from _caught("Labels", check_predictions.labels(case, state, row, backend))
                    yield from _caught("Version", check_predictions.versions(case, state, row))
                    yield from _caught("Predictions", check_predictions.predictions(case, state, row))
                    yield from _caught("Order", check_predictions.order(case, state))
                    yield from _caught("Training", check_predictions.training(case, state, backend, here))
            yield from _caught("Images", check_files.images(case, state))
    yield from check_files.disk(case)


def _caught(name: str, check: Iterable[Check]) -> Generator[Check, None, Any]:
    """What a check finds and returns; its error is a failed check `name`, and it returns None then."""
    try:
        return (yield from check)
    except YolonasError as error:
        yield failed(name, error)
        return None
