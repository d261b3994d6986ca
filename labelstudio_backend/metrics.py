"""What Prometheus reads at /metrics: counters that the code adds to, and the state that is looked up when it asks.

Labels have few values each: routes by their pattern, reasons by their kind, projects by their key.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import GC_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from labelstudio_backend import logs
from labelstudio_backend.job import FINAL, last_ap50
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from labelstudio_backend.job_queue import JobQueue
    from labelstudio_backend.registry import Registry
    from labelstudio_backend.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STATES = ("queued", "running", *FINAL)
ACTIONS = (
    "ANNOTATION_CREATED",
    "ANNOTATION_UPDATED",
    "ANNOTATIONS_DELETED",
    "PROJECT_UPDATED",
    "TASKS_CREATED",
    "START_TRAINING",
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

PROCESS = CollectorRegistry()  # of this process, whatever applications it runs
PROCESS.register(PROCESS_COLLECTOR)
PROCESS.register(GC_COLLECTOR)

requests = Counter("yolonas_http_requests", "Requests answered.", ("method", "route", "status"), registry=PROCESS)
predict_seconds = Histogram(
    "yolonas_predict_seconds",
    "Time from the arrival of a /predict to its answer; Label Studio gives up after 100 s.",
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 100),
    registry=PROCESS,
)
tasks = Counter(
    "yolonas_tasks",
    "Tasks of /predict: predicted, or why not: late, media (no image to be had or read), data (none named), model.",
    ("outcome",),
    registry=PROCESS,
)
model_load_seconds = Histogram(
    "yolonas_model_load_seconds",
    "Time to load a model.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80),
    registry=PROCESS,
)
model_load_failures = Counter("yolonas_model_load_failures", "Models that could not be loaded.", registry=PROCESS)
media = Counter(
    "yolonas_media_fetches", "Images asked for: in the cache, downloaded, or failed.", ("result",), registry=PROCESS
)
webhooks = Counter("yolonas_webhook_events", "Events from Label Studio.", ("action",), registry=PROCESS)
for kind in ("predicted", "late", "media", "data", "model"):  # from the start on
    tasks.labels(kind)
for result in ("cached", "downloaded", "failed"):
    media.labels(result)


def webhook(action: str) -> None:
    """An event came; what Label Studio does not send is counted together."""
    webhooks.labels(action if action in ACTIONS else "other").inc()


def outcome(reason: str) -> str:
    """The kind of a reason why a task has no prediction although it was reached, as the service words it."""
    if "the model failed" in reason:
        return "model"
    return "data" if reason.startswith("its data") else "media"


@contextlib.contextmanager
def fetching() -> Iterator[None]:
    """Count the download of an image."""
    try:
        yield
    except BaseException:
        media.labels("failed").inc()
        raise
    media.labels("downloaded").inc()


class Observed:
    """ASGI middleware: a request ID for the log and the answer's `X-Request-ID`, and the counts of requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[\w.-]{1,64}", given, re.ASCII) else secrets.token_hex(6)
        began, status = time.monotonic(), 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            with logs.about(request=request_id):
                await self._app(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            requests.labels(method, route, status).inc()
            if route == "/predict":
                predict_seconds.observe(time.monotonic() - began)


class _State(Collector):
    """What is true now of one application, looked up when Prometheus asks."""

    def __init__(
        self,
        registry: Registry,
        service: Service,
        jobs: JobQueue | None,
        reconciled: Callable[[], float | None],
    ) -> None:
        self._registry, self._service, self._jobs, self._reconciled = registry, service, jobs, reconciled

    def collect(self) -> Iterator[Metric]:
        waiting = self._service.scheduler.load()
        yield _gauge("yolonas_predict_queue_requests", "Requests in the queue to the models.", waiting["requests"])
        yield _gauge("yolonas_predict_queue_images", "Images in the queue to the models.", waiting["images"])
        yield _gauge("yolonas_models_loaded", "Models in memory.", self._service.models.count())
        yield _gauge("yolonas_media_cache_bytes", "Size of the cache of fetched images.", self._service.media.size())
        if (when := self._reconciled()) is not None:
            text = "When a look at Label Studio last succeeded, Unix seconds; its age is the reconciler's lag."
            yield _gauge("yolonas_reconcile_last_success_timestamp_seconds", text, when)
        yield from self._versions()
        if self._jobs is not None:
            with contextlib.suppress(YolonasError):  # a shared queue that is away: the others are told all the same
                yield from _jobs(self._jobs)

    def _versions(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "yolonas_version_info",
            "The version that serves, always 1.",
            labels=("project", "version", "runtime", "precision"),
        )
        ap, ap50 = (
            GaugeMetricFamily(
                f"yolonas_version_{name}",
                f"{title} of the version that serves, on its held-out images, 0 to 1.",
                labels=("project",),
            )
            for name, title in (("ap", "AP at IoU 0.50 to 0.95"), ("ap50", "AP at IoU 0.50"))
        )
        for project in self._registry.projects():
            with contextlib.suppress(YolonasError, OSError, json.JSONDecodeError):
                version = project.current()
                serving = version.record.get("serving") or {}
                runtime, precision = (str(serving.get(key, "")) for key in ("runtime", "precision"))
                info.add_metric([project.key, version.name, runtime, precision], 1)
                figures = version.figures
                for family, value in ((ap, figures["ap"]), (ap50, figures["ap50"])):
                    if value is not None:
                        family.add_metric([project.key], value)
        yield from (info, ap, ap50)


def _jobs(jobs: JobQueue) -> Iterator[Metric]:
    by_state = GaugeMetricFamily("yolonas_jobs", "Trainings by state.", labels=("state",))
    progress = GaugeMetricFamily(
        "yolonas_training_progress_ratio", "How far a running training is, 0 to 1.", labels=("project",)
    )
    ap50 = GaugeMetricFamily(
        "yolonas_training_ap50",
        "AP at IoU 0.50 of a running training, as last measured on some of the held-out images, 0 to 1.",
        labels=("project",),
    )
    counts = dict.fromkeys(STATES, 0)
    for job in jobs.find(brief=True):
        counts[job.state] += 1
        if job.state == "running":
            progress.add_metric([job.project], job.progress)
            whole = jobs.get(job.id)
            if whole is not None and (measured := last_ap50(whole.curve)) is not None:
                ap50.add_metric([job.project], measured)
    for state, count in counts.items():
        by_state.add_metric([state], count)
    yield from (by_state, progress, ap50)


def _gauge(name: str, text: str, value: Any) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


class Metrics:
    """The text of /metrics for one application."""

    def __init__(
        self,
        registry: Registry,
        service: Service,
        jobs: JobQueue | None = None,
        reconciled: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._state = CollectorRegistry(auto_describe=False)
        self._state.register(_State(registry, service, jobs, reconciled))

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(PROCESS) + generate_latest(self._state)
