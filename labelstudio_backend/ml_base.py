"""The same service for people who host with label-studio-ml: a thin subclass of its LabelStudioMLBase.

    # _wsgi.py
    from label_studio_ml.api import init_app
    from labelstudio_backend.ml_base import YolonasBackend
    app = init_app(model_class=YolonasBackend)

Settings are those of `serve`, in environment variables. Works with label-studio-ml 2.x, and as far as that can with
1.0.9; the README says what each way of hosting can and cannot do. An instance lives for one request in 2.x, so the
service, the jobs and the reconciler belong to the process and are shared.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import threading
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from flask import has_request_context, request
from label_studio_ml.model import LabelStudioMLBase

from labelstudio_backend.app import create_app
from labelstudio_backend.service import Service
from labelstudio_backend.settings import Settings

try:
    from label_studio_ml.response import ModelResponse
except ImportError:  # 1.0.9
    ModelResponse = None

logger = logging.getLogger(__name__)

_guard = threading.Lock()
_apps: dict[int, FastAPI] = {}  # by process: a fork of gunicorn has its parent's memory, but not its threads


class YolonasBackend(LabelStudioMLBase):  # type: ignore[misc]
    """Pre-annotates tasks and learns from corrections, as `yolonas-labelstudio serve` does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if ModelResponse is None:
            self.setup()  # 2.x calls it by itself

    def setup(self) -> None:
        """Make the project of a /setup request known, and its current version the model version."""
        body = _request()
        if "schema" not in body:
            return
        version = _service().setup(body)["model_version"]
        if ModelResponse is not None:
            self.set("model_version", version)

    def predict(self, tasks: list[dict[str, Any]], context: Mapping[str, Any] | None = None, **_: Any) -> Any:
        """A ModelResponse with one element for each task; a list of them with 1.0.9.

        There the version is left out, as 1.0.9 gives one of its own to /setup, and Label Studio takes predictions of
        another version for old ones.
        """
        body = _request()
        answer = _service().predict(
            {
                "tasks": tasks,
                "project": body.get("project") or self._project(),
                "label_config": body.get("label_config", self.label_config),
                "params": {"context": context},
            }
        )
        if ModelResponse is not None:
            return ModelResponse(predictions=answer["results"])
        return [
            {key: value for key, value in result.items() if key != "model_version"} if result else result
            for result in answer["results"]
        ]

    def fit(self, *arguments: Any, **options: Any) -> Any:
        """Take an event: a hint for the reconciler, or START_TRAINING, which queues a job; returns at once.

        2.x gives `event` and `data`. 1.0.9 starts a process for each event and gives them by name; there is nothing to
        do in it, as the reconciler of the server sees the annotation within `YOLONAS_RECONCILE_SECONDS`.
        """
        if multiprocessing.parent_process() is not None:
            return None
        named = dict(zip(("event", "data"), arguments, strict=False)) | options
        body = {**(named.get("data") or {}), "action": named.get("event")}
        try:
            return _app().state.take_event(body)
        except Exception as error:  # Label Studio shows nothing of it, and label-studio-ml a traceback
            logger.error("%s: %s", body["action"], error)
            return {"error": str(error)}

    def _project(self) -> str:
        """ "ID.timestamp" of the project where no request says it: the one last seen with this number."""
        number = str(getattr(self, "project_id", "") or 0)
        known = [p for p in _service().registry.projects() if str(p.project_id) == number]
        uid = max(known, key=lambda project: project.seen_at()).metadata()["uid"] if known else f"{number}.0"
        return str(uid)


def _request() -> Mapping[str, Any]:
    """What Label Studio sent, where Flask is answering it: label-studio-ml passes on a part of it only."""
    body = request.get_json(silent=True) if has_request_context() else None
    return body if isinstance(body, Mapping) else {}


def _service() -> Service:
    service: Service = _app().state.service
    return service


def _app() -> FastAPI:
    """The backend of this process, made and started when it is first needed."""
    with _guard:
        app = _apps.get(os.getpid())
        if app is None:
            app = _apps[os.getpid()] = _started(Settings())
        return app


def _started(settings: Settings) -> FastAPI:
    """What `serve` has without its HTTP server: the routes are label-studio-ml's."""
    app = create_app(settings)
    app.state.start()
    atexit.register(app.state.stop)
    return app
