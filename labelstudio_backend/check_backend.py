"""The checks of the way between Label Studio and the backend: its row, its address, its password, its webhook."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

import httpx

from labelstudio_backend.backend import UNREACHABLE, VERSION_NAME, Backend, BackendError, find_row, same_address
from labelstudio_backend.check import Case, Check, failed
from labelstudio_backend.connect import explanation, left_webhooks, missing_of, unused_webhooks
from labelstudio_backend.label_studio_http import RESERVED_ADVICE, LabelStudioError


def backend_row(case: Case) -> Generator[Check, None, dict[str, Any] | None]:
    """Whether Label Studio has it, and whether it is the one that is asked."""
    name = "Backend"
    case.rows = rows = case.client.ml_backends(case.project)
    row = find_row(rows, case.project, case.url)
    if row is None:
        which = f"at {case.url}" if case.url else "of yolonas"
        yield Check(name, "FAIL", f"the project has no backend {which}", case.connect)
        return None
    case.url = str(row["url"]).rstrip("/")
    others = [other for other in rows if other["id"] != row["id"]]
    twins = [other for other in others if same_address(other["url"], row["url"])]
    if twins:
        yield Check(name, "FAIL", f"it is connected {len(twins) + 1} times", case.connect)
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


def address(case: Case, row: Mapping[str, Any], backend: Backend) -> Generator[Check, None, bool]:
    """Whether Label Studio reaches it, and whether it is reached from here."""
    name = "Address"
    try:
        backend.call("health")
        here = ""
    except BackendError as error:
        here = str(error)
    if row.get("state") in UNREACHABLE:
        problem = _why(case, row)
        seen = "from here it does not answer either" if here else "from here it answers"
        text, _, advice = problem.partition(": ")
        yield Check(name, "FAIL", f"{text}; {seen}", advice)
    elif not VERSION_NAME.fullmatch(str(row.get("model_version"))):
        text = f"what answers at {case.url} names itself {row.get('model_version')!r}, which is not of yolonas"
        yield Check(name, "FAIL", text, "give its address as --url, and connect it")
    elif here:
        text = f"Label Studio reaches {case.url}; from here it does not answer, so less can be checked"
        yield Check(name, "WARN", text, "run doctor where the backend runs")
    else:
        yield Check(name, "OK", f"{case.url} answers, here and to Label Studio")
    return not here


def _why(case: Case, row: Mapping[str, Any]) -> str:
    """Why Label Studio does not reach the backend: saving its row unchanged checks that, and says."""
    try:
        case.client.patch_ml_backend(row)
    except LabelStudioError as error:
        if RESERVED_ADVICE in str(error):
            return f"Label Studio refuses the address {case.url}: {RESERVED_ADVICE}"
        return explanation(str(error), str(case.url))
    return f"Label Studio did not reach {case.url} a moment ago: {row.get('error_message') or 'run doctor again'}"


def password(case: Case, row: Mapping[str, Any], backend: Backend) -> Iterator[Check]:
    """Whether the backend asks for one, and whether Label Studio and we have it."""
    name = "Password"
    try:
        open_to_all = backend.status("versions", headers={}) != 401
        lets_us_in = backend.status("versions") != 401
    except BackendError as error:
        yield failed(name, error)
        return
    sends = row.get("auth_method") == "BASIC_AUTH"
    if open_to_all and case.credentials.header:
        advice = "start it with the same YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or YOLONAS_SECRET"
        yield Check(name, "WARN", "one is set here, but the backend asks for none", advice)
    elif open_to_all and not same_address(str(case.url), f"http://localhost:{_port(str(case.url))}"):
        advice = "set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS where it runs, then connect"
        yield Check(name, "WARN", "none: whoever reaches the backend may have it predict and train", advice)
    elif open_to_all:
        yield Check(name, "OK", "none, on an address of this machine")
    elif not lets_us_in:
        advice = "set YOLONAS_BASIC_AUTH_USER and YOLONAS_BASIC_AUTH_PASS, or YOLONAS_SECRET, as where it runs"
        yield Check(name, "FAIL", "the backend refuses what is set here", advice)
    elif not sends:
        yield Check(name, "FAIL", "the backend asks for one, which Label Studio does not send", case.connect)
    else:
        yield Check(name, "OK", "asked for, and sent by Label Studio")


def webhooks(case: Case, backend: Backend, here: bool) -> Iterator[Check]:
    """Whether events come: without them corrections are only seen by and by."""
    name, there = "Webhook", case.client.webhooks(case.project)
    ours = [webhook for webhook in there if same_address(webhook["url"], f"{case.url}/webhook")]
    unused = unused_webhooks(there, [str(case.url), *(row["url"] for row in case.rows)])
    left = left_webhooks(unused, [], case.transport)
    if not ours:
        text = f"there is none to {case.url}/webhook, so no corrections are heard of"
        yield Check(name, "FAIL", text, f"{case.connect}; should Label Studio refuse it: {RESERVED_ADVICE}")
    else:
        yield _whole(case, ours[0], backend, here)
    for webhook in [*ours[1:], *left]:
        why = "is a second one" if webhook in ours else "is left of a deleted backend"
        yield Check(name, "WARN", f"webhook {webhook['id']} ({webhook['url']}) {why}", case.connect)
    for webhook in unused:
        if webhook not in left:  # nobody can tell whose it was: connect leaves it alone
            text = f"webhook {webhook['id']} ({webhook['url']}) is of no backend of the project"
            advice = (
                "if a deleted backend left it, remove it under Settings > Webhooks: where nobody answers it, each "
                "submitted annotation takes up to a second longer"
            )
            yield Check(name, "WARN", text, advice)


def _whole(case: Case, webhook: Mapping[str, Any], backend: Backend, here: bool) -> Check:
    name = "Webhook"
    missing = missing_of(webhook, case.credentials.header)
    if missing:
        return Check(name, "FAIL", f"webhook {webhook['id']} lacks {', '.join(missing)}", case.connect)
    try:
        case.client.patch_webhook(webhook["id"], url=webhook["url"])  # as it is: its address is checked
    except LabelStudioError as error:
        if RESERVED_ADVICE in str(error):
            text = "Label Studio sends no events to this address"
            return Check(name, "FAIL", text, RESERVED_ADVICE)
        if error.status == 403:
            text = f"whether Label Studio sends webhook {webhook['id']} to its address is not known"
            return Check(name, "WARN", text, "run doctor with a token whose user may save webhooks")
        return failed(name, error)
    if here:
        try:  # an event that means nothing
            status = backend.status("webhook", {"action": "DOCTOR"}, headers=webhook.get("headers") or {})
        except BackendError as error:
            return failed(name, error)
        if status != 200:
            text = f"the backend answers {status} to events with the headers of webhook {webhook['id']}"
            return Check(name, "FAIL", text, case.connect)
    return Check(name, "OK", f"webhook {webhook['id']} sends all events" + (", which are taken" if here else ""))


def _port(url: str) -> int:
    return httpx.URL(url).port or (443 if url.startswith("https") else 80)
