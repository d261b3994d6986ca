"""`yolonas-labelstudio doctor`: looks at everything between Label Studio and this backend, and says what to do."""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
import httpx

from labelstudio_backend.backend import (
    UNREACHABLE,
    VERSION_NAME,
    Backend,
    BackendError,
    Credentials,
    find_row,
    same_address,
)
from labelstudio_backend.cli import settings_from
from labelstudio_backend.client import LabelStudio, project_uid
from labelstudio_backend.connect import SAMPLING, backend_url, explanation, left_webhooks, missing_of, project_options
from labelstudio_backend.label_studio_http import RESERVED_ADVICE, LabelStudioError, jwt_payload
from labelstudio_backend.mapping import Mapped
from labelstudio_backend.media import MediaCache
from labelstudio_backend.registry import Registry
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import Version, class_names
from yolonas.errors import YolonasError

TESTED = (1, 23)  # of Label Studio
TRIED_IMAGES = 3
SHOWN_CLASSES = 10
FULL, SCARCE = 200 * 2**20, 2 * 2**30  # bytes free: one version takes 30 to 300 MB, a training some more
COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "red"}

State = Literal["OK", "WARN", "FAIL"]


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it."""

    name: str
    state: State
    text: str
    advice: str = ""


@click.command()
@project_options
@click.option("--url", callback=backend_url, help="The backend's address in Label Studio.  [default: that of yolonas]")
@click.option("--json", "as_json", is_flag=True, help="A JSON list of the checks, for programs.")
def doctor(project: int, url: str | None, as_json: bool, **options: Any) -> None:
    """Check the connection of a Label Studio project to this backend, and say what to do about what is wrong.

    Run it where the backend runs, with its environment. It changes nothing. The exit code is 1 where a check fails.
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
        click.echo(f"\n{_count(failures, 'failure')}, {_count(warnings, 'warning')}.")
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
        yield from _Doctor(settings, client, project, url, transport).run()


class _Doctor:
    def __init__(
        self,
        settings: Settings,
        client: LabelStudio,
        project: int,
        url: str | None,
        transport: httpx.BaseTransport | None,
    ) -> None:
        self.settings, self.client, self.project, self.url = settings, client, project, url
        self.transport = transport
        self.credentials = Credentials.of(settings)

    @property
    def _connect(self) -> str:
        return f"yolonas-labelstudio connect --project {self.project} --url {self.url or 'ADDRESS'}"

    def run(self) -> Iterator[Check]:
        if (yield from self._studio()) and (yield from self._token()):
            state = yield from self._project()
            if state is not None:
                row = yield from self._backend()
                if row is not None:
                    self.url = str(row["url"]).rstrip("/")
                    with Backend(self.url, self.credentials, transport=self.transport) as backend:
                        here = yield from self._reached(row, backend)
                        if here:
                            yield from self._password(row, backend)
                        yield from self._webhook(backend, here)
                        yield from self._labels(state, row, backend)
                        yield from self._versions(state, row)
                        yield from self._order(state)
                        yield from self._training(state, backend, here)
                yield from self._images(state)
        yield from self._disk()

    # -- Label Studio ----------------------------------------------------------------------------------------------

    def _studio(self) -> Generator[Check, None, bool]:
        name = "Label Studio"
        if not self.settings.label_studio_url:
            yield Check(name, "FAIL", "its address is not set", "set YOLONAS_LABEL_STUDIO_URL")
            return False
        try:
            url, transport = self.settings.label_studio_url, self.transport
            with LabelStudio(url, None, read_seconds=30.0, retries=1, transport=transport) as anybody:
                version = anybody.version()
        except LabelStudioError as error:
            yield _failed(name, error)
            return False
        text = f"{version or 'of an unknown version'} at {self.settings.label_studio_url}"
        if _numbers(version) < TESTED:
            older = f"yolonas is tested with {'.'.join(map(str, TESTED))}: update if something does not work"
            yield Check(name, "WARN", text, older)
        else:
            yield Check(name, "OK", text)
        return True

    def _token(self) -> Generator[Check, None, bool]:
        name, token = "Token", self.settings.token or ""
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
            user = self.client.user()
        except LabelStudioError as error:
            if error.status == 401:
                text = f"Label Studio refuses the {kind}" + ("" if payload else " (they are off unless switched on)")
                yield Check(name, "FAIL", text, make)
            else:
                yield _failed(name, error)
            return False
        yield Check(name, "OK", f"{kind} of {user}")
        return True

    def _project(self) -> Generator[Check, None, dict[str, Any] | None]:
        try:
            state = self.client.get_project(self.project)
        except LabelStudioError as error:
            yield _failed("Project", error)
            return None
        labelled = state.get("num_tasks_with_annotations", 0)
        yield Check(
            "Project", "OK", f"{state.get('title')!r}, {_count(state['task_number'], 'task')}, {labelled} labelled"
        )
        return state

    # -- the backend -----------------------------------------------------------------------------------------------

    def _backend(self) -> Generator[Check, None, dict[str, Any] | None]:
        """Whether Label Studio has it, and whether it is the one that is asked."""
        name = "Backend"
        self.rows = rows = self.client.ml_backends(self.project)
        row = find_row(rows, self.project, self.url)
        if row is None:
            which = f"at {self.url}" if self.url else "of yolonas"
            yield Check(name, "FAIL", f"the project has no backend {which}", self._connect)
            return None
        self.url = str(row["url"]).rstrip("/")
        others = [other for other in rows if other["id"] != row["id"]]
        twins = [other for other in others if same_address(other["url"], row["url"])]
        if twins:
            yield Check(name, "FAIL", f"it is connected {len(twins) + 1} times", self._connect)
        elif others and rows[0]["id"] != row["id"]:
            first = f"backend {rows[0]['id']} ({rows[0]['url']})"
            text = f"{first} comes before it, and in batches Label Studio asks only the first"
            yield Check(name, "FAIL", text, f"remove {first} under Settings > Model, if you do not need it")
        elif others:
            listed = ", ".join(f"{other['id']} ({other['url']})" for other in others)
            text = f"in batches Label Studio asks only this one, not the project's other backends: {listed}"
            yield Check(name, "WARN", text, "remove them under Settings > Model, if you do not need them")
        else:
            yield Check(name, "OK", f"backend {row['id']} of the project, the only one")
        return row

    def _reached(self, row: Mapping[str, Any], backend: Backend) -> Generator[Check, None, bool]:
        """Whether Label Studio reaches it, and whether it is reached from here."""
        name = "Address"
        try:
            backend.call("health")
            here = ""
        except BackendError as error:
            here = str(error)
        if row.get("state") in UNREACHABLE:
            problem = self._why(row)
            seen = "from here it does not answer either" if here else "from here it answers"
            text, _, advice = problem.partition(": ")
            yield Check(name, "FAIL", f"{text}; {seen}", advice)
        elif not VERSION_NAME.fullmatch(str(row.get("model_version"))):
            text = f"what answers at {self.url} names itself {row.get('model_version')!r}, which is not of yolonas"
            yield Check(name, "FAIL", text, "give its address as --url, and connect it")
        elif here:
            text = f"Label Studio reaches {self.url}; from here it does not answer, so less can be checked"
            yield Check(name, "WARN", text, "run doctor where the backend runs")
        else:
            yield Check(name, "OK", f"{self.url} answers, here and to Label Studio")
        return not here

    def _why(self, row: Mapping[str, Any]) -> str:
        """Why Label Studio does not reach the backend: saving its row unchanged checks that, and says."""
        try:
            self.client.patch_ml_backend(row)
        except LabelStudioError as error:
            if RESERVED_ADVICE in str(error):
                return f"Label Studio refuses the address {self.url}: {RESERVED_ADVICE}"
            return explanation(str(error), str(self.url))
        return f"Label Studio did not reach {self.url} a moment ago: {row.get('error_message') or 'run doctor again'}"

    def _password(self, row: Mapping[str, Any], backend: Backend) -> Iterator[Check]:
        name = "Password"
        try:
            open_to_all = backend.status("versions", headers={}) != 401
            lets_us_in = backend.status("versions") != 401
        except BackendError as error:
            yield _failed(name, error)
            return
        sends = row.get("auth_method") == "BASIC_AUTH"
        if open_to_all and self.credentials.header:
            advice = "start it with the same YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or YOLONAS_SECRET"
            yield Check(name, "WARN", "one is set here, but the backend asks for none", advice)
        elif open_to_all and not same_address(str(self.url), f"http://localhost:{_port(str(self.url))}"):
            advice = "set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS where it runs, then connect"
            yield Check(name, "WARN", "none: whoever reaches the backend may have it predict and train", advice)
        elif open_to_all:
            yield Check(name, "OK", "none, on an address of this machine")
        elif not lets_us_in:
            advice = "set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or YOLONAS_SECRET, as where it runs"
            yield Check(name, "FAIL", "the backend refuses what is set here", advice)
        elif not sends:
            yield Check(name, "FAIL", "the backend asks for one, which Label Studio does not send", self._connect)
        else:
            yield Check(name, "OK", "asked for, and sent by Label Studio")

    # -- webhooks --------------------------------------------------------------------------------------------------

    def _webhook(self, backend: Backend, here: bool) -> Iterator[Check]:
        """Whether events come: without them corrections are only seen by and by."""
        name = "Webhook"
        try:
            there = self.client.webhooks(self.project)
        except LabelStudioError as error:
            yield _failed(name, error)
            return
        ours = [webhook for webhook in there if same_address(webhook["url"], f"{self.url}/webhook")]
        left = left_webhooks(there, [str(self.url), *(row["url"] for row in self.rows)], [], self.transport)
        if not ours:
            text = f"there is none to {self.url}/webhook, so no corrections are heard of"
            yield Check(name, "FAIL", text, f"{self._connect}; should Label Studio refuse it: {RESERVED_ADVICE}")
        else:
            yield self._whole(ours[0], backend, here)
        for webhook in [*ours[1:], *left]:
            why = "is a second one" if webhook in ours else "is left of a deleted backend"
            yield Check(name, "WARN", f"webhook {webhook['id']} ({webhook['url']}) {why}", self._connect)

    def _whole(self, webhook: Mapping[str, Any], backend: Backend, here: bool) -> Check:
        name = "Webhook"
        missing = missing_of(webhook, self.credentials.header)
        if missing:
            return Check(name, "FAIL", f"webhook {webhook['id']} lacks {', '.join(missing)}", self._connect)
        try:
            self.client.patch_webhook(webhook["id"], url=webhook["url"])  # as it is: its address is checked
        except LabelStudioError as error:
            if RESERVED_ADVICE in str(error):
                text = "Label Studio sends no events to this address"
                return Check(name, "FAIL", text, RESERVED_ADVICE)
            return _failed(name, error)
        if here:
            try:  # an event that means nothing
                status = backend.status("webhook", {"action": "DOCTOR"}, headers=webhook.get("headers") or {})
            except BackendError as error:
                return _failed(name, error)
            if status != 200:
                text = f"the backend answers {status} to events with the headers of webhook {webhook['id']}"
                return Check(name, "FAIL", text, self._connect)
        return Check(name, "OK", f"webhook {webhook['id']} sends all events" + (", which are taken" if here else ""))

    # -- labels and versions ---------------------------------------------------------------------------------------

    def _version(self, row: Mapping[str, Any]) -> Version | None:
        """The version that Label Studio was told, where this machine has it."""
        name = str(row.get("model_version"))
        projects = Registry(self.settings.projects_dir).projects()
        return next((v for project in projects for v in project.versions() if v.name == name), None)

    def _labels(self, state: Mapping[str, Any], row: Mapping[str, Any], backend: Backend) -> Iterator[Check]:
        from labelstudio_backend.mapping import mapped, served_controls

        name, version = "Labels", self._version(row)
        try:
            controls = served_controls(state["label_config"])
            if not controls:
                text = 'the label config has no <RectangleLabels> on an <Image value="$...">, nor <VideoRectangle>'
                yield Check(name, "FAIL", text, "add one under Settings > Labeling Interface")
                return
            if version is None:
                yield from self._labels_told(str(row.get("model_version")), backend)
                return
            found = mapped(controls, version, class_names)
        except YolonasError as error:
            yield _failed(name, error)
            return
        yield from map(_mapping, found)

    def _labels_told(self, version: str, backend: Backend) -> Iterator[Check]:
        """What the backend says of its labels itself, where its state is on another machine."""
        key = version.removeprefix("yolonas-").rpartition("-v")[0]
        try:
            told = backend.call(f"api/projects/{key}")["labels"]
            controls = [(control["name"], control["labels"]) for control in told["controls"]]
        except (BackendError, KeyError, TypeError):
            text = f"{version} is not in {self.settings.state_dir}, so its classes are not known here"
            yield Check("Labels", "WARN", text, "run doctor where the backend runs, with its YOLONAS_STATE_DIR")
            return
        if told.get("problem"):
            yield Check("Labels", "WARN", str(told["problem"]), "run doctor again once something was predicted")
            return
        for name, labels in controls:
            missing = [label for label in labels if not label["classes"]]
            text = _share(len(labels) - len(missing), len(labels), name, [label["label"] for label in missing])
            state: State = "OK" if not missing else "WARN" if len(missing) < len(labels) else "FAIL"
            yield Check("Labels", state, text, str(missing[0].get("advice") or "") if missing else "")

    def _versions(self, state: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[Check]:
        """The version that answers = title = project.model_version = that of the predictions."""
        name, version = "Version", str(row.get("model_version"))
        shown, kept = state.get("model_version"), self._version(row)
        if row.get("auto_update") is False:
            yield Check(name, "FAIL", "Label Studio was told to stay at one version of the backend", self._connect)
        elif row.get("title") != version or shown != version:
            text = f"the backend serves {version}, its title is {row.get('title')!r}, the project shows {shown!r}"
            yield Check(name, "FAIL", text, f"{self._connect} (else tasks are not ordered, and predicted twice)")
        else:
            yield Check(name, "OK", f"{version} serves, is the backend's title, and is what the project shows")
        given, tasks = self.client.model_versions(self.project), int(state["task_number"])
        count, others = given.get(version, 0), sum(given.values()) - given.get(version, 0)
        text = f"{count} of {_count(tasks, 'task')} have a prediction of {version}" + (
            f", {others} predictions are of others" if others else ""
        )
        push = f"yolonas-labelstudio push --project {self.project}"
        if count >= tasks:
            yield Check("Predictions", "OK", text)
        elif others or (kept is not None and kept.trained):
            yield Check("Predictions", "WARN", text, f"{push} makes the rest")
        else:
            yield Check("Predictions", "OK", f"{text}; the others get theirs when they are opened, or all by `{push}`")

    def _order(self, state: Mapping[str, Any]) -> Iterator[Check]:
        if state.get("show_collab_predictions"):
            yield Check("Live prediction", "OK", "an opened task gets its prediction")
        else:
            yield Check("Live prediction", "WARN", "off: show_collab_predictions is not set", self._connect)
        if state.get("sampling") == SAMPLING:
            yield Check("Order", "OK", "what the model is least sure of comes first in the label stream")
        else:
            text = f"the label stream has {state.get('sampling')!r}, so what the model is unsure of does not come first"
            yield Check("Order", "WARN", text, f"{self._connect}, unless that is meant")

    def _training(self, state: Mapping[str, Any], backend: Backend, here: bool) -> Iterator[Check]:
        name, can_train = "Training", self.settings.can_train
        if here:
            try:
                can_train = bool(backend.call("").get("can_train"))
            except BackendError as error:
                yield _failed(name, error)
                return
        if not can_train:
            advice = "set YOLONAS_LABEL_STUDIO_URL and YOLONAS_LABEL_STUDIO_TOKEN where the backend runs, and start it"
            yield Check(name, "WARN", "not possible: the backend has no access to the annotations", advice)
            return
        every = self.settings.train_every
        when = f"when asked for, and after every {every} corrected tasks" if every else "only when asked for"
        yield Check(name, "OK", f"{when}; {state.get('num_tasks_with_annotations', 0)} tasks are labelled")

    # -- images and disk -------------------------------------------------------------------------------------------

    def _images(self, state: Mapping[str, Any]) -> Iterator[Check]:
        """Some of the images, fetched as for a prediction, into a cache of their own: so really fetched."""
        from labelstudio_backend.mapping import served_controls
        from labelstudio_backend.video import checked
        from yolonas.inference.sources import read_image

        try:
            controls = served_controls(state["label_config"])
            keys = list(dict.fromkeys((control.data_key, control.media) for control in controls))
            tasks = self.client.some_tasks(self.project, TRIED_IMAGES)
        except YolonasError as error:
            yield _failed("Images", error)
            return
        if not tasks or not keys:
            yield Check("Images", "OK", "no task has one yet")
            return
        fetched, sizes = 0, []
        with tempfile.TemporaryDirectory() as folder:
            media = MediaCache(
                self.settings.model_copy(update={"state_dir": Path(folder)}), self.client, transport=self.transport
            )
            for task in tasks:
                for key, kind in keys:
                    value = task["data"].get(key)
                    if not isinstance(value, str) or not value:
                        text = f'the data of task {task["id"]} has no text under "{key}", where the label config looks'
                        yield Check(
                            "Images", "FAIL", text, f"name the right key in the label config's <{kind.title()} value>"
                        )
                        continue
                    video = kind == "video"
                    try:
                        file = media.fetch(value, task_id=task["id"], hostname=self._hostname(state), video=video)
                        if video:
                            count = checked(file).frame_count() or "?"
                        else:
                            pixels = read_image(file)
                    except YolonasError as error:
                        failed = _failed("Images", error)
                        yield Check("Images", "FAIL", f"task {task['id']}: {failed.text}", failed.advice)
                        continue
                    fetched += 1
                    sizes.append(f"{count} frames" if video else f"{pixels.shape[1]} x {pixels.shape[0]}")
            media.close()
        if fetched:
            yield Check(
                "Images", "OK", f"{fetched} of {len(tasks) * len(keys)} tried are fetched and read ({', '.join(sizes)})"
            )

    def _hostname(self, state: Mapping[str, Any]) -> str:
        """The address under which Label Studio names itself, from what it told the backend."""
        project = Registry(self.settings.projects_dir).find(project_uid(state))
        return "" if project is None else str(project.metadata().get("hostname", ""))

    def _disk(self) -> Iterator[Check]:
        folder = self.settings.state_dir
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / 2**30:.1f} GB are free for {folder}"
        if not os.access(there, os.W_OK):
            advice = "mend its permissions, or set YOLONAS_STATE_DIR to another folder"
            yield Check("Disk", "FAIL", f"{there} cannot be written", advice)
        elif free < SCARCE:
            state: State = "FAIL" if free < FULL else "WARN"
            advice = (
                "free some space: versions, trainings and fetched images (YOLONAS_MEDIA_CACHE_BYTES) are kept there"
            )
            yield Check("Disk", state, text, advice)
        else:
            yield Check("Disk", "OK", text)


def _mapping(one: Mapped) -> Check:
    """How many of a control's labels the model's classes become, and what to write for the others."""
    control, names, unmatched = one.control, one.names or (), one.unmatched
    known = len(control.labels) - len(unmatched)
    text = _share(known, len(control.labels), control.from_name, unmatched)
    if not unmatched:
        return Check("Labels", "OK", text)
    state: State = "WARN" if known else "FAIL"
    if one.version is None:
        return Check("Labels", state, text, str(one.remark))
    if one.own:
        return Check("Labels", state, text, "the version has not learned them: label some, and train")
    first = unmatched[0]
    close = difflib.get_close_matches(first.casefold(), names, 3, 0.6)
    shown = list(dict.fromkeys([*close, *names]))[:SHOWN_CLASSES]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    suggestion = close[0] if close else "..."
    return Check(
        "Labels",
        state,
        text,
        f'name the classes that mean it: <Label value="{first}" predicted_values="{suggestion}"/>; the model knows '
        f"{', '.join(shown)}{more} (or train on corrected tasks: then the classes are the labels)",
    )


def _share(known: int, count: int, name: str, unmatched: Sequence[str]) -> str:
    text = f"{known} of {_count(count, 'label')} of <{name}> are predicted"
    return f"{text}, not {', '.join(unmatched)}" if unmatched else text


def _failed(name: str, error: YolonasError) -> Check:
    """An error's sentence: what is wrong, and behind the semicolon what to do."""
    text, _, advice = str(error).partition("; ")
    return Check(name, "FAIL", text, advice)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _port(url: str) -> int:
    return httpx.URL(url).port or (443 if url.startswith("https") else 80)
