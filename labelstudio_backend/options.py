"""What the commands about one project of Label Studio share: its number, and where Label Studio and the backend are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import click

from labelstudio_backend.client import LabelStudio
from labelstudio_backend.settings import Settings


def backend_url(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The option --url: http(s), without a login in it."""
    if value is None:
        return None
    parts = urlsplit(value.strip())
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise click.BadParameter(f"{value!r} needs its scheme, like http://localhost:9090")
    if "@" in parts.netloc:
        raise click.BadParameter("a login does not belong into the address: set YOLONAS_BASIC_AUTH_USER and _PASS")
    return value.strip().rstrip("/")


def label_studio(settings: Settings) -> LabelStudio:
    """The client of the Label Studio that the settings name, with a token; else a sentence on how to name it."""
    if not settings.can_train:
        raise click.UsageError("set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN, or give them as options")
    return LabelStudio(settings.label_studio_url, settings.token)


def project_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of the commands about one project: its number, and where Label Studio is."""
    options = [
        click.option("--project", type=int, required=True, help="The number in the project's address."),
        click.option("--label-studio-url", help="Where Label Studio is, for example http://localhost:8080."),
        click.option(
            "--label-studio-token",
            "--token",
            "label_studio_token",
            help="Its token; better in the environment, as YOLONAS_LABEL_STUDIO_TOKEN.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command
