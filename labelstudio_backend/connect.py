"""`yolonas-labelstudio connect`: makes the connection of this backend to a Label Studio project, or repairs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import httpx

from labelstudio_backend.backend import UNREACHABLE, Backend, Credentials, is_ours, same_address
from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.label_studio_http import RESERVED_ADVICE, LabelStudioError
from labelstudio_backend.options import backend_url, label_studio, project_options
from yolonas.errors import YolonasError

MARK = "X-Yolonas"  # a header of our webhooks, by which one that a deleted backend left is known as ours
WHOLE = {"send_payload": True, "send_for_all_actions": True, "is_active": True}  # of a webhook
SAMPLING = "Uncertainty sampling"


class ConnectError(YolonasError):
    """A connection that cannot be made; the message says what to do."""


@dataclass
class Connection:
    """What came of it: Label Studio's row of the backend, what was changed, and what the token may not change.

    row: None where it would only be added by a dry run.
    """

    row: dict[str, Any] | None = None
    changes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


@click.command()
@project_options
@click.option("--url", callback=backend_url, help="The backend's address, as Label Studio reaches it.")
@click.option("--keep-sampling", is_flag=True, help="Leave the order of the label stream as it is.")
@click.option("--dry-run", is_flag=True, help="Say what would be changed, and change nothing.")
def connect(project: int, url: str | None, keep_sampling: bool, dry_run: bool, **options: Any) -> None:
    """Connect the backend at --url to a Label Studio project, or repair its connection.

    Sets the backend's title to the version that it serves, its webhook, live predictions, and sampling by uncertainty;
    removes what deleted backends left. Repeat it at any time: what is right stays. --url may be left out where the
    project has a backend of ours. The backend's password is read from YOLONAS_BASIC_AUTH_USER, YOLONAS_BASIC_AUTH_PASS
    and YOLONAS_SECRET, as by `serve`.
    """
    settings = settings_from(**options)
    with label_studio(settings) as client:
        if url is None:
            rows = [row for row in client.ml_backends(project) if is_ours(row, project)]
            if len({row["url"] for row in rows}) != 1:
                raise click.UsageError("give --url, the backend's address as Label Studio reaches it")
            url = str(rows[0]["url"])
        connection = connect_project(
            client,
            project,
            url,
            Credentials.of(settings),
            sampling=not keep_sampling,
            dry_run=dry_run,
            say=click.echo,
        )
    for sentence in connection.refused:
        click.echo(f"Error: {sentence}", err=True)
    if not connection.changes and not connection.refused:
        click.echo("Nothing to change.")
    if connection.refused:
        raise click.exceptions.Exit(1)


def connect_project(
    client: LabelStudio,
    project: int,
    url: str,
    credentials: Credentials | None = None,
    *,
    earlier: str = "",
    sampling: bool = True,
    dry_run: bool = False,
    say: Callable[[str], object] = lambda line: None,
    transport: httpx.BaseTransport | None = None,
) -> Connection:
    """Make the connection of the backend at `url`, as Label Studio reaches it, to a project, or repair it.

    Does nothing where nothing is to be changed.

    Args:
        client: of that Label Studio.
        project: the project's ID.
        url: the backend's address.
        credentials: what the backend asks for, if anything.
        earlier: an address at which the same backend was before.
        sampling: have Label Studio order tasks by the scores of the predictions.
        dry_run: say only.
        say: is given one line on each change.
        transport: in place of the network, for looking at who answers behind a leftover webhook.

    Raises:
        LabelStudioError: Label Studio did not answer, or the token may not see the project.
        ConnectError: Label Studio cannot use the backend.
    """
    connector = _Connector(client, project, url.rstrip("/"), credentials or Credentials(), dry_run, say, transport)
    return connector.run(earlier, sampling)


class _Connector:
    def __init__(
        self,
        client: LabelStudio,
        project: int,
        url: str,
        credentials: Credentials,
        dry_run: bool,
        say: Callable[[str], object],
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.client, self.project, self.url, self.credentials = client, project, url, credentials
        self.dry_run, self.say, self.transport = dry_run, say, transport
        self.gone: list[str] = []  # addresses at which this backend was
        self.found = Connection()

    def run(self, earlier: str, sampling: bool) -> Connection:
        self.client.get_project(self.project)  # a wrong number or token is said before anything is changed
        if earlier:
            self.gone.append(earlier)
        row = self.found.row = self._row(self._rows())
        if row is not None:
            self._title(row)
        self._webhooks(row)
        self._settings(row, sampling)
        return self.found

    def _change(self, line: str, work: Callable[[], Any]) -> bool:
        """Say and do one change; one that the token may not do is noted, and the others go on."""
        if self.dry_run:
            self.found.changes.append(line)
            self.say(f"would do: {line}")
            return False
        try:
            work()
        except LabelStudioError as error:
            if error.status != 403:
                raise
            why = RESERVED_ADVICE if RESERVED_ADVICE in str(error) else "the token's user may not do this"
            self.found.refused.append(f"refused by Label Studio: {line}; {why}")
            return False
        self.found.changes.append(line)
        self.say(line)
        return True

    # -- the row of the backend ------------------------------------------------------------------------------------

    def _rows(self) -> list[dict[str, Any]]:
        return self.client.ml_backends(self.project)

    def _row(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        """See that there is one row of this backend, and that it works; None where a dry run would add it."""
        family = [row for row in rows if self._same_backend(row)]
        if not family:
            with _explained(self.url):
                add = partial(
                    self.client.add_ml_backend, self.project, self.url, title="yolonas", **self.credentials.row
                )
                self._change(f"backend {self.url} added to the project", add)
            if self.found.refused:
                raise ConnectError(self.found.refused[0])
            if self.dry_run:
                return None
            return self._usable(next(row for row in self._rows() if same_address(row["url"], self.url)))
        row = family[0]  # of the project's backends only the first is asked in batches
        self.gone += [other["url"] for other in family if not same_address(other["url"], self.url)]
        values = self._wanted(row)
        if values:
            with _explained(self.url):
                self._change(_described(row, values), partial(self.client.patch_ml_backend, row, **values))
            row = self._read(row)
        for twin in family[1:]:
            line = f"backend {twin['id']} ({twin['url']}) removed: it is the same as backend {row['id']}"
            self._change(line, partial(self.client.delete_ml_backend, twin["id"]))
        return row if self.dry_run else self._usable(row)

    def _same_backend(self, row: Mapping[str, Any]) -> bool:
        """At this address, or at an earlier one: one that we were told, or where nobody answers for our versions."""
        if any(same_address(str(row["url"]), address) for address in (self.url, *self.gone)):
            return True
        return row.get("state") in UNREACHABLE and is_ours(row, self.project)

    def _wanted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What of the row is not as it must be."""
        values: dict[str, Any] = {}
        if str(row["url"]).rstrip("/") != self.url:
            values["url"] = self.url
        login = self.credentials.row
        same = row.get("auth_method") == "BASIC_AUTH" and row.get("basic_auth_user") == login.get("basic_auth_user")
        # Label Studio does not tell which password it has: a wrong one shows in the state.
        if login and (not same or row.get("state") in UNREACHABLE):
            values |= login
        if row.get("auto_update") is False:  # it would stay at one version
            values["auto_update"] = True
        return values

    def _usable(self, row: dict[str, Any]) -> dict[str, Any]:
        if row.get("state") in UNREACHABLE:
            with _explained(self.url):
                self.client.patch_ml_backend(row)  # checks the connection, and says what is wrong with it
            row = self._read(row)
        if row.get("state") in UNREACHABLE or not row.get("model_version"):
            why = row.get("error_message") or "it names no version"
            raise ConnectError(f"Label Studio cannot use the backend at {self.url}: {why}; look into its log")
        return row

    def _read(self, row: dict[str, Any]) -> dict[str, Any]:
        return next((other for other in self._rows() if other["id"] == row["id"]), row)

    def _title(self, row: dict[str, Any]) -> None:
        """Title := version. Only so does Label Studio order tasks by the scores of this backend's predictions."""
        version = str(row["model_version"])
        if row["title"] != version:
            line = f"backend {row['id']}: title {row['title']!r} -> {version!r}"
            self._change(line, partial(self._retitle, row, version))

    def _retitle(self, row: dict[str, Any], version: str) -> None:
        title = self.client.retitle_ml_backend(row, version)["title"]
        if title != version:
            raise ConnectError(
                f"the title of backend {row['id']} stays {title!r}: Label Studio saves the old one at the end of a "
                "training or batch prediction; connect again when that has ended"
            )

    # -- webhooks --------------------------------------------------------------------------------------------------

    def _webhooks(self, row: Mapping[str, Any] | None) -> None:
        """See that there is one webhook of the backend, whole, and none of deleted ones."""
        there = self.client.webhooks(self.project)
        ours = [webhook for webhook in there if same_address(webhook["url"], f"{self.url}/webhook")]
        headers = {MARK: "backend", **self.credentials.header}
        if ours:
            self._mend(ours[0], headers)
        elif row is not None:  # a dry run would add it with the backend
            add = partial(self.client.create_webhook, self.project, f"{self.url}/webhook", headers)
            self._change(f"webhook {self.url}/webhook added", add)
        others, left = [webhook for webhook in there if webhook not in ours], []
        if others:
            rows = [row["url"] for row in self._rows() if not any(same_address(row["url"], a) for a in self.gone)]
            left = left_webhooks(unused_webhooks(others, [self.url, *rows]), self.gone, self.transport)
        for webhook, why in [
            *((w, "it is there twice") for w in ours[1:]),
            *((w, "its backend is gone") for w in left),
        ]:
            line = f"webhook {webhook['id']} ({webhook['url']}) removed: {why}"
            self._change(line, partial(self.client.delete_webhook, webhook["id"]))

    def _mend(self, webhook: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        missing = missing_of(webhook, headers)
        if missing:
            line = f"webhook {webhook['id']} ({webhook['url']}): {', '.join(missing)} set"
            values = {**WHOLE, "url": webhook["url"], "headers": {**(webhook.get("headers") or {}), **headers}}
            self._change(line, partial(self.client.patch_webhook, webhook["id"], **values))

    # -- the project -----------------------------------------------------------------------------------------------

    def _settings(self, row: Mapping[str, Any] | None, sampling: bool) -> None:
        state = self.client.get_project(self.project)
        wanted: dict[str, Any] = {"show_collab_predictions": True}
        if row is not None and not (self.dry_run and state.get("model_version") == row["title"]):  # moves with it
            wanted["model_version"] = str(row["model_version"])
        if sampling:
            wanted["sampling"] = SAMPLING
        for key, value in wanted.items():
            if state.get(key) != value:
                line = f"project {self.project}: {key} {state.get(key)!r} -> {value!r}"
                self._change(line, partial(self.client.patch_project, self.project, **{key: value}))


def missing_of(webhook: Mapping[str, Any], headers: Mapping[str, str]) -> list[str]:
    """What a webhook of the backend lacks: the names of fields and headers, without any value."""
    there = webhook.get("headers") or {}
    missing = [key for key, value in WHOLE.items() if webhook.get(key) != value]
    return missing + [f"header {name}" for name, value in headers.items() if there.get(name) != value]


def unused_webhooks(webhooks: Iterable[Mapping[str, Any]], used: Iterable[str]) -> list[Mapping[str, Any]]:
    """The webhooks that end in /webhook, as those of backends do, with no backend `used` at their address any more."""
    used = list(used)
    backends = [webhook for webhook in webhooks if str(webhook["url"]).rstrip("/").endswith("/webhook")]
    return [one for one in backends if not any(same_address(_base(one), address) for address in used)]


def left_webhooks(
    unused: Iterable[Mapping[str, Any]], gone: Iterable[str], transport: httpx.BaseTransport | None = None
) -> list[Mapping[str, Any]]:
    """Those of the `unused` webhooks that deleted yolonas backends left in a project beyond doubt.

    They carry our mark, or are of an address that is `gone`, or a yolonas backend answers there. Any others may be
    somebody else's.
    """
    gone, left = list(gone), []
    for webhook in unused:
        base = _base(webhook)
        known = MARK in (webhook.get("headers") or {}) or any(same_address(base, address) for address in gone)
        if not known:
            with Backend(base, transport=transport) as backend:
                known = backend.is_yolonas()
        if known:
            left.append(webhook)
    return left


def _base(webhook: Mapping[str, Any]) -> str:
    """The address of the backend that a webhook is of."""
    return str(webhook["url"]).rstrip("/").removesuffix("/webhook")


def _described(row: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    parts = []
    if "url" in values:
        parts.append(f"address {row['url']} -> {values['url']}")
    if "basic_auth_user" in values:
        parts.append(f"user {values['basic_auth_user']!r} and password set")
    if "auto_update" in values:
        parts.append("follows the versions of the backend")
    return f"backend {row['id']}: {', '.join(parts)}"


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Where Label Studio does not take the backend at this address, one sentence says why."""
    try:
        yield
    except LabelStudioError as error:
        if error.status not in (400, 500):
            raise
        raise ConnectError(explanation(str(error), url)) from error


def explanation(said: str, url: str) -> str:
    """Why Label Studio does not take the backend at `url`, and what to do, from what it `said`."""
    if "authentication parameters" in said or re.search(r"\b401\b", said.partition("it says:")[2]):
        return (
            f"the backend at {url} asks for a password: set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, "
            "or YOLONAS_SECRET, here to what it was started with"
        )
    if "Can't connect to ML backend" in said or "Can't resolve hostname" in said:
        reason = re.search(r"(Connection refused|timed out|Name or service not known|[45]\d\d [A-Z][\w ]+)", said)
        why = f" ({reason[0]})" if reason else ""
        return (
            f"Label Studio does not reach the backend at {url}{why}: start it, and give the address under which the "
            "machine of Label Studio reaches it (in a container, localhost is the container itself)"
        )
    if "valid ML backend" in said:
        reason = re.search(r"Reason: (.*?)\.? ?Check the ML", said)
        return f"what answers at {url} is no backend that works: {reason[1] if reason else said}; look into its log"
    return said
