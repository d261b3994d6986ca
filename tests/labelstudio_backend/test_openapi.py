"""The OpenAPI document is the protocol: schemathesis sends what fits it and what does not, to a real server."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings

from labelstudio_backend.settings import Settings
from small_backend import small_backend

GenerationMode = schemathesis.GenerationMode

SECRET = "0f1e2d3c4b5a69788796"
LOGIN = {"Authorization": f"Bearer {SECRET}"}
CONFIG = """<View><Image name="image" value="$image"/>
<RectangleLabels name="label" toName="image"><Label value="Car"/></RectangleLabels></View>"""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(
        state_dir=tmp_path_factory.mktemp("state"),
        weights="yolo_nas_s_coco",
        label_studio_url="",
        label_studio_token=None,
        secret=SECRET,
    )
    with small_backend(settings) as url:
        yield url


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_route_keeps_to_the_document(backend: str, mode: GenerationMode) -> None:
    """No 5xx; what fits is taken and what does not is refused, answers are as described, and all need the secret."""
    document = schemathesis.openapi.from_url(f"{backend}/openapi.json", headers=LOGIN)
    accepted = document.config.checks.positive_data_acceptance
    accepted.expected_statuses = [*accepted.expected_statuses, "410"]  # a job that is not there
    operations = [result.ok() for result in document.get_all_operations()]
    assert {"/setup", "/predict", "/webhook"} <= {operation.path for operation in operations}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @hypothesis_settings(
            max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def fuzz(case: Any) -> None:
            case.call_and_validate(headers=LOGIN)

        fuzz()


def test_the_document_names_every_route(backend: str) -> None:
    answer = httpx.get(f"{backend}/openapi.json", headers=LOGIN)
    paths = answer.json()["paths"]
    assert {"/health", "/setup", "/predict", "/webhook", "/versions", "/job_status"} <= set(paths)
    assert paths["/health"]["get"]["security"] == []
    assert answer.json()["security"] == [{"basic": []}, {"secret": []}]
    assert "422" not in answer.text
    assert httpx.get(f"{backend}/openapi.json").status_code == 401


def test_what_label_studio_sends_fits_the_document_and_is_answered(backend: str) -> None:
    from jsonschema import Draft202012Validator

    body = {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls", "extra_params": None}
    answers = {"/setup": httpx.post(f"{backend}/setup", json=body, headers=LOGIN)}
    task = {"id": 3, "data": {"image": "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAAC"}}
    predict = {"tasks": [task], "project": "5.1795289898", "label_config": CONFIG, "params": {"context": None}}
    answers["/predict"] = httpx.post(f"{backend}/predict", json=predict, headers=LOGIN)
    paths = httpx.get(f"{backend}/openapi.json", headers=LOGIN).json()["paths"]
    for path, answer in answers.items():
        described = paths[path]["post"]
        assert answer.status_code == 200
        content = described["responses"]["200"]["content"]["application/json"]
        Draft202012Validator(content["schema"]).validate(answer.json())
        asked = described["requestBody"]["content"]["application/json"]["schema"]
        Draft202012Validator(asked).validate(body if path == "/setup" else predict)


REQUESTS: dict[str, dict[str, Any]] = {
    "/setup": {"project": "5.1795289898", "schema": CONFIG, "hostname": "http://ls", "extra_params": None},
    "/predict": {
        "tasks": [{"id": 1, "data": {"image": "data:,x"}, "annotations": [], "predictions": []}],
        "project": "5.1795289898",
        "label_config": CONFIG,
        "params": {"context": None, "login": None, "password": None},
    },
    "/webhook": {"action": "START_TRAINING", "project": {"id": 5, "created_at": "2026-11-22T00:49:58Z"}},
    "/job_status": {"job": "7"},
}
WRONG = (
    None,
    True,
    -1,
    10**300,
    1e308,
    "",
    "x" * 100_000,
    "\0",
    "../..",
    "\u0663.1",
    [[]],
    {"a": {}},
    "0001-01-01T00:00:00",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value within a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("route", REQUESTS)
def test_each_value_of_a_request_may_be_anything(backend: str, route: str) -> None:
    with httpx.Client(base_url=backend, headers=LOGIN) as http:
        for path in places(REQUESTS[route]):
            for wrong in WRONG:
                body = {"": copy.deepcopy(REQUESTS[route])}
                inner: Any = body
                for key in ("", *path)[:-1]:
                    inner = inner[key]
                inner[("", *path)[-1]] = wrong
                answer = http.post(route, json=body[""])
                assert answer.status_code < 500, (path, wrong, answer.text)
                assert len(answer.text) < 2000
                if answer.status_code != 200:
                    assert list(answer.json()) == ["error"]
                elif route == "/predict":
                    assert len(answer.json()["results"]) == len(body[""]["tasks"])


@pytest.mark.parametrize(
    "raw",
    [b'{"project": NaN}', b"[" * 100_000, b'{"job": ' + b"7" * 5000 + b"}", rb'{"action": "\udfff"}', b"\xff", b"\0"],
)
@pytest.mark.parametrize("path", ["/setup", "/predict", "/webhook", "/job_status"])
def test_what_is_no_json_is_a_400(backend: str, path: str, raw: bytes) -> None:
    answer = httpx.post(f"{backend}{path}", content=raw, headers=LOGIN)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]


def test_a_body_too_large_gets_its_answer_over_a_socket(backend: str) -> None:
    """Also where the client sends all of it before it reads."""

    def chunks() -> Iterator[bytes]:
        for _ in range(520):
            yield b"x" * 1024**2

    answer = httpx.post(f"{backend}/predict", content=chunks(), headers=LOGIN, timeout=60)
    assert answer.status_code == 413
    assert "YOLONAS_MAX_BODY_BYTES" in answer.json()["error"]
