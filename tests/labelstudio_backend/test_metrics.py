"""/metrics as Prometheus reads it, and log lines as machines read them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dashboard_state import Backend, backend, picture
from labelstudio_backend import logs, metrics

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with backend(tmp_path_factory.mktemp("metrics"), tasks=2) as found:
        yield found


def scrape(served: Backend) -> Samples:
    answer = httpx.get(f"{served.url}/metrics", trust_env=False)
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(answer.text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def test_names_follow_the_conventions(served: Backend) -> None:
    text = httpx.get(f"{served.url}/metrics", trust_env=False).text
    for family in text_string_to_metric_families(text):
        if not family.name.startswith("yolonas_"):
            assert family.name.startswith(("process_", "python_"))
            continue
        assert family.documentation.endswith("."), family.name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", family.name)
        assert not re.search(r"milli|_ms\b|percent|_kb|_mb", family.name)
        if family.type == "counter":
            assert f"# TYPE {family.name}_total counter" in text
        elif family.type == "histogram":
            assert family.name.endswith("_seconds")


def test_requests_are_counted_by_route_and_not_by_address(served: Backend) -> None:
    before = scrape(served)
    for path in ("/api/jobs/1", "/api/jobs/2", "/api/jobs/999", "/nothing/here", "/nor/here"):
        httpx.get(served.url + path, trust_env=False)
    after = scrape(served)

    def grown(route: str, status: str) -> float:
        labels = {"method": "GET", "route": route, "status": status}
        return value(after, "yolonas_http_requests_total", **labels) - value(
            before, "yolonas_http_requests_total", **labels
        )

    assert grown("/api/jobs/{job}", "200") == 2
    assert grown("/api/jobs/{job}", "404") == 1
    assert grown("other", "404") == 2
    assert not any("999" in str(labels) or "nothing" in str(labels) for _, labels in after)


def test_predictions_are_counted_with_the_reasons_of_what_failed(served: Backend) -> None:
    import base64

    before = scrape(served)
    good = "data:image/jpeg;base64," + base64.b64encode(picture(0)).decode()
    images = [good, good, "data:image/jpeg;base64,AAAA", "http://elsewhere.example/1.jpg"]
    tasks = [{"id": number, "data": {"image": image}} for number, image in enumerate(images)]
    tasks.append({"id": 9, "data": {"text": "no image"}})
    state = served.registry.metadata()
    body = {"tasks": tasks, "project": state["uid"], "label_config": state["label_config"]}
    answer = httpx.post(f"{served.url}/predict", json=body, timeout=60, trust_env=False)
    assert [bool(result) for result in answer.json()["results"]] == [True, True, False, False, False]
    after = scrape(served)
    grown = {
        kind: value(after, "yolonas_tasks_total", outcome=kind) - value(before, "yolonas_tasks_total", outcome=kind)
        for kind in ("predicted", "media", "data", "late", "model")
    }
    assert grown == {"predicted": 2, "media": 2, "data": 1, "late": 0, "model": 0}
    count = "yolonas_predict_seconds_count"
    assert value(after, count) - value(before, count) == 1
    assert value(after, "yolonas_models_loaded") == 1
    assert value(after, "yolonas_media_cache_bytes") >= len(picture(0))
    texts = [
        problem["text"]
        for problem in httpx.get(f"{served.url}/api/projects/{served.key}", trust_env=False).json()["problems"]
    ]
    assert any(
        text.startswith("No prediction: http://elsewhere.example/1.jpg is on elsewhere.example") for text in texts
    )


def test_the_state_is_looked_up(served: Backend) -> None:
    served.jobs.enqueue(served.key, "START_TRAINING")
    job = served.jobs.claim()
    assert job is not None
    curve = [{"epoch": 1, "loss": 2.0, "ap50": 0.25}, {"epoch": 2, "loss": 1.0}]
    served.jobs.report(job.id, progress=0.5, curve=curve)
    samples = scrape(served)
    served.finish(job.id, "cancelled", "the test is over")
    assert value(samples, "yolonas_jobs", state="running") == 1
    assert value(samples, "yolonas_jobs", state="succeeded") == 4
    assert value(samples, "yolonas_jobs", state="queued") == 0
    assert value(samples, "yolonas_training_progress_ratio", project=served.key) == 0.5
    assert value(samples, "yolonas_training_ap50", project=served.key) == 0.25
    info = {
        "project": served.key,
        "version": served.registry.current().name,
        "runtime": "openvino",
        "precision": "int8",
    }
    assert value(samples, "yolonas_version_info", **info) == 1
    assert value(samples, "yolonas_version_ap50", project=served.key) == 0.836
    assert value(samples, "yolonas_reconcile_last_success_timestamp_seconds") == 1_700_000_000


def test_events_of_other_kinds_are_counted_together(served: Backend) -> None:
    before = scrape(served)
    for action in ("ANNOTATION_CREATED", "PROJECT_UPDATED", "FROM_A_STRANGER_1", "FROM_A_STRANGER_2"):
        httpx.post(f"{served.url}/webhook", json={"action": action}, trust_env=False)
    after = scrape(served)
    name = "yolonas_webhook_events_total"
    assert value(after, name, action="other") - value(before, name, action="other") == 2
    assert value(after, name, action="PROJECT_UPDATED") - value(before, name, action="PROJECT_UPDATED") == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("the model failed on its image (RuntimeError: x)", "model"),
        ('its data has no text under "image", where the label config looks for the image', "data"),
        ("/data/upload/1/a.jpg could not be fetched: localhost answered 404; the file is not there", "media"),
    ],
)
def test_reasons_have_kinds(reason: str, kind: str) -> None:
    assert metrics.outcome(reason) == kind


# -- logs ------------------------------------------------------------------------------------------------------------


def test_an_answer_carries_the_id_of_its_request(served: Backend) -> None:
    given = httpx.get(f"{served.url}/health", headers={"X-Request-ID": "a.b-c_1"}, trust_env=False)
    assert given.headers["x-request-id"] == "a.b-c_1"
    for unusable in ("", "x" * 65, "a b", 'a"b'):
        made = httpx.get(f"{served.url}/health", headers={"X-Request-ID": unusable}, trust_env=False)
        assert re.fullmatch(r"[0-9a-f]{12}", made.headers["x-request-id"])


def test_lines_about_a_request_name_it_and_the_project(served: Backend, caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.setFormatter(logs.JsonFormatter())
    handler.emit = lambda record: lines.append(handler.format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("labelstudio_backend")
    caplog.set_level(logging.INFO, logger.name)
    logger.addHandler(handler)
    try:
        state = served.registry.metadata()
        body = {"tasks": [{"id": 1, "data": {}}], "project": state["uid"], "label_config": state["label_config"]}
        httpx.post(f"{served.url}/predict", json=body, headers={"X-Request-ID": "r1"}, timeout=60, trust_env=False)
    finally:
        logger.removeHandler(handler)
    about = [json.loads(line) for line in lines]
    assert [entry for entry in about if "0 of 1 tasks predicted" in entry["message"]]
    for entry in about:
        assert (entry["request"], entry["project"]) == ("r1", served.key)
        assert {"time", "level", "logger", "message"} <= entry.keys()


def test_what_lines_are_about_does_not_leak_to_other_threads() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "said %d", (1,), None)
    with logs.about(project="5-abc"), logs.about(job=7), ThreadPoolExecutor(1) as other:
        here = json.loads(logs.JsonFormatter().format(record))
        there = json.loads(other.submit(logs.JsonFormatter().format, record).result())
    after = json.loads(logs.JsonFormatter().format(record))
    assert (here["project"], here["job"], here["message"]) == ("5-abc", 7, "said 1")
    assert "project" not in there
    assert "project" not in after


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_process_logs_in_the_format_that_is_set(log_format: str) -> None:
    script = f"""
import logging
from labelstudio_backend import logs
logs.configure({log_format!r}, job=3)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("x").exception("two\\nlines and é")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    if log_format == "text":
        assert "ERROR two\nlines and é\nTraceback" in ran.stderr
        return
    (line,) = ran.stderr.splitlines()
    entry = json.loads(line)
    assert entry["message"] == "two\nlines and é"
    assert entry["job"] == 3
    assert entry["level"] == "ERROR"
    assert "ZeroDivisionError" in entry["exception"]
