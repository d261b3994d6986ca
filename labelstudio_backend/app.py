"""The HTTP routes that Label Studio calls; no logic.

/health, /setup, /webhook and /versions run on threads of their own, so that they answer within Label Studio's 1 to 3
seconds however many predictions are being made. So does what looks into the queue of trainings, which may be in a Redis
that does not answer: /job_status, START_TRAINING, the dashboard and /metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from contextvars import copy_context
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from labelstudio_backend import metrics, openapi
from labelstudio_backend.api import Api
from labelstudio_backend.client import LabelStudio
from labelstudio_backend.control_api import Queue, control_router
from labelstudio_backend.job_queue import JobQueue, QueueError
from labelstudio_backend.media import MediaCache
from labelstudio_backend.models import Load
from labelstudio_backend.overview import Overview
from labelstudio_backend.page import Page
from labelstudio_backend.protection import Protection, RefusedError, read_json
from labelstudio_backend.redaction import redact
from labelstudio_backend.registry import Registry
from labelstudio_backend.service import BadRequestError, Service
from labelstudio_backend.settings import Settings
from labelstudio_backend.version import RegistryError, choose_weights

if TYPE_CHECKING:
    from labelstudio_backend.remote_runner import RemoteRunner

logger = logging.getLogger(__name__)

QUICK_THREADS = 4
LOOK_THREADS = 4
SENTENCE = 1000  # characters of an error: what was sent may be in it
PREDICT_THREADS = 64  # they wait for the scheduler; what comes on top of so many is refused at once


class Learner(Protocol):
    """What keeps Label Studio's state and ours in agreement."""

    def hint(self, project_key: str, action: str, payload: Mapping[str, Any]) -> None: ...


@dataclass
class Learning:
    """The learning side, present where Label Studio's address and a token are set."""

    jobs: Queue
    reconciler: Learner
    start: Callable[[], None]
    stop: Callable[[], None]


def create_app(settings: Settings, *, load: Load | None = None, learning: Learning | None = None) -> FastAPI:
    """The backend as an ASGI application.

    `load` makes a model of a version (by default a `yolonas.Detector`), `learning` replaces the learning side.
    """
    if settings.weights == "auto":
        settings = settings.model_copy(update={"weights": choose_weights("auto")[0]})
    registry = Registry(settings.projects_dir)
    client = LabelStudio(settings.label_studio_url, settings.token) if settings.label_studio_url else None
    media = MediaCache(settings, client)
    service = Service(settings, registry, media, load=load)
    if learning is None and settings.can_train and client is not None:
        learning = _learning(settings, registry, client, service)
    quick = ThreadPoolExecutor(QUICK_THREADS, "quick")
    looks = ThreadPoolExecutor(LOOK_THREADS, "look")
    slow = ThreadPoolExecutor(PREDICT_THREADS, "predict")
    jobs = learning.jobs if learning is not None and isinstance(learning.jobs, JobQueue) else None
    overview = Overview(registry, _glance(settings) if client is not None else None)
    api = Api(settings, registry, service, jobs, overview, looks)
    exported = metrics.Metrics(registry, service, jobs, lambda: _last_success(learning))
    page = Page()

    def start() -> None:
        for leftover in registry.clean():
            logger.info("removed what an interrupted write left: %s", leftover)
        for project in registry.projects():
            with contextlib.suppress(RegistryError, OSError, ValueError):  # a record that is no JSON
                project.retain(settings.keep_versions)
        service.warm()
        if learning is not None:
            learning.start()

    def stop() -> None:
        if learning is not None:
            learning.stop()
        service.close()
        api.close()
        for pool in (quick, looks, slow):
            pool.shutdown(wait=False, cancel_futures=True)
        media.close()
        if client is not None:
            client.close()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if load is None:  # importing torch takes seconds: before the first request, not in it
            importlib.import_module("yolonas.inference.detector")
        start()
        yield
        await asyncio.to_thread(stop)

    app = FastAPI(
        title="yolonas",
        version=version("yolonas"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=openapi.PROBLEMS,
        exception_handlers={HTTPException: _refused, RequestValidationError: _unfit},
    )
    app.add_middleware(Protection, settings=settings)
    openapi.describe(app, settings)
    app.state.service, app.state.learning, app.state.overview = service, learning, overview
    # for who hosts otherwise, see ml_base
    app.state.start, app.state.stop = start, stop
    app.state.take_event = lambda body: _webhook(service, learning, body)
    app.add_middleware(metrics.Observed)
    app.include_router(page.router)
    app.include_router(api.router)
    predicting = 0  # threads that are taken: one of them may have to notice yet that its client has left

    def done(_: object) -> None:
        nonlocal predicting
        predicting -= 1

    def changed(key: str) -> None:
        service.start_loading(key)
        if learning is not None:
            learning.reconciler.hint(key, "chosen by a person", {})

    @app.exception_handler(QueueError)
    async def queue_away(_: Request, error: QueueError) -> Response:
        return _problem(503, str(error))

    app.include_router(control_router(registry, learning.jobs if learning is not None else None, changed))

    async def answer(pool: ThreadPoolExecutor, work: Callable[[Any], Any], request: Request) -> Response:
        body = await request.body()
        context = copy_context()  # with the request's ID, for the log
        return await asyncio.get_running_loop().run_in_executor(pool, context.run, _answer, work, body)

    @app.get("/")
    async def index(request: Request) -> Response:
        if page.wanted(request):
            return page.index(request)
        answer = _json(200, {"name": "yolonas", "status": "UP", "can_train": learning is not None})
        answer.headers["Vary"] = "Accept"
        return answer

    @app.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        text = await asyncio.get_running_loop().run_in_executor(looks, exported.text)
        return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "UP"}

    @app.post("/setup", **openapi.ROUTES["/setup"])
    async def setup(request: Request) -> Response:
        return await answer(quick, service.setup, request)

    @app.post("/predict", **openapi.ROUTES["/predict"])
    async def predict(request: Request) -> Response:
        nonlocal predicting
        gone: Future[None] = Future()
        body = await request.body()  # before it is counted: between the two others may come
        if predicting >= PREDICT_THREADS:
            gone.set_result(None)  # nothing is computed, but what a batch action asks is noted, to be made up for
            await answer(quick, lambda parsed: service.predict(parsed, gone), request)
            return _json(503, {"error": f"{predicting} requests are being worked on; ask again later"})
        predicting += 1
        work = asyncio.get_running_loop().run_in_executor(
            slow, copy_context().run, _answer, lambda parsed: service.predict(parsed, gone), body
        )
        work.add_done_callback(done)
        watch = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.set_result(None)  # of no consequence where the answer is there
            watch.cancel()
        return await work

    @app.get("/versions", **openapi.ROUTES["/versions"])
    async def versions(request: Request) -> Response:
        return await answer(quick, lambda _: service.versions(), request)

    @app.post("/webhook", **openapi.ROUTES["/webhook"])
    async def webhook(request: Request) -> Response:
        pool = looks if b"START_TRAINING" in await request.body() else quick
        return await answer(pool, lambda body: _webhook(service, learning, body), request)

    @app.post("/job_status", **openapi.ROUTES["/job_status"])
    async def job_status(request: Request) -> Response:
        return await answer(looks, lambda body: _job_status(learning, body), request)

    return app


async def _left(request: Request) -> None:
    """Ends when the client closes the connection; for after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _webhook(service: Service, learning: Learning | None, body: Mapping[str, Any]) -> dict[str, Any]:
    """An event is a hint, and says nothing that is relied on; START_TRAINING queues a job."""
    action = body.get("action")
    if not isinstance(action, str):
        raise BadRequestError('/webhook needs the text "action"')
    metrics.webhook(action)
    project = service.project_of(body)
    training = action == "START_TRAINING"
    if learning is None:
        if training:
            raise RefusedError(
                409,
                "this backend cannot train: it has no access to the annotations; set YOLONAS_LABEL_STUDIO_URL and "
                "YOLONAS_LABEL_STUDIO_TOKEN and start it again",
            )
        return {}
    if project is None:
        if training:
            raise RefusedError(409, "this project is not known here; open its model page in Label Studio, then retry")
        return {}
    if training:
        return {"job": str(learning.jobs.enqueue(project.key, action))}
    learning.reconciler.hint(project.key, action, body)
    return {}


def _job_status(learning: Learning | None, body: Mapping[str, Any]) -> Mapping[str, Any]:
    job = body.get("job")
    if not isinstance(job, str | int):
        raise BadRequestError('/job_status needs "job", as /webhook gave it')
    possible = len(str(job)) <= 18  # SQLite has no longer numbers
    status = learning.jobs.status(job) if learning is not None and possible else None
    if status is None:
        raise RefusedError(410, f"there is no job {job!r} here")
    return status


def _answer(work: Callable[[Any], Any], raw: bytes) -> Response:
    """Parse, work and serialize on a worker thread: a request of 5000 tasks is some megabytes."""
    try:
        return _json(200, work(read_json(raw)))
    except BadRequestError as error:
        return _problem(400, str(error))
    except RefusedError as error:
        logger.warning("%s", error.detail)
        return _problem(error.status_code, error.detail)
    except (RegistryError, QueueError) as error:
        logger.error("%s", error)
        return _problem(503, str(error))
    except Exception as error:
        logger.exception("a request failed")
        return _problem(500, f"{type(error).__name__}: {error}")


def _problem(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> Response:
    answer = _json(status, {"error": redact(sentence)[:SENTENCE]})
    answer.headers.update(headers or {})
    return answer


async def _refused(_: Request, error: Any) -> Response:
    """Every route says what is wrong in the same way."""
    return _problem(error.status_code, str(error.detail), error.headers)


async def _unfit(_: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:]) or "the request"
    return _problem(400, f"{where}: {first['msg']}")


def _json(status: int, content: Any) -> Response:
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


def _glance(settings: Settings) -> LabelStudio:
    """For the dashboard, which asks again by itself and whose thread a dead Label Studio should not hold for long."""
    return LabelStudio(settings.label_studio_url, settings.token, read_seconds=20.0, retries=0)


def _last_success(learning: Learning | None) -> float | None:
    return getattr(learning.reconciler, "last_success", None) if learning is not None else None


def _learning(settings: Settings, registry: Registry, client: LabelStudio, service: Service) -> Learning:
    from labelstudio_backend.job_runner import JobRunner
    from labelstudio_backend.jobs import Jobs, open_jobs
    from labelstudio_backend.reconcile import Reconciler

    jobs = open_jobs(settings)
    reconciler = Reconciler(settings, registry, client, jobs, service)
    runner: RemoteRunner | JobRunner
    if isinstance(jobs, Jobs):
        runner = JobRunner(jobs, registry, parallel=settings.parallel_jobs, on_end=reconciler.job_ended)
    else:
        from labelstudio_backend.remote_runner import RemoteRunner

        runner = RemoteRunner(jobs, registry, on_end=reconciler.job_ended)

    def start() -> None:
        runner.start()
        reconciler.start()

    def stop() -> None:
        reconciler.stop()
        runner.stop()

    return Learning(jobs, reconciler, start, stop)
