"""The models in memory: loaded lazily, one at a time, shared by projects that start from the same weights."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from labelstudio_backend import metrics, serving
from labelstudio_backend.settings import UNTRAINED, Settings
from labelstudio_backend.version import Version
from yolonas.errors import YolonasError

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections

logger = logging.getLogger(__name__)

FAILED_LOAD_SECONDS = 30.0  # a model that could not be loaded is not tried again sooner


class Thresholds(Protocol):
    """The thresholds that a checkpoint or an exported file is meant to run at."""

    @property
    def conf(self) -> float: ...
    @property
    def iou(self) -> float: ...


class Model(Protocol):
    """What serving needs of a `yolonas.Detector`."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def checkpoint(self) -> Thresholds: ...
    def predict_batch(
        self, images: list[np.ndarray], conf: float, iou: float | None, max_det: int, batch: int, *, signals: bool
    ) -> list[Detections]: ...


Load = Callable[[Version], Model]


class Models:
    """At most `settings.loaded_models` models; the one in service stays until its successor is loaded."""

    def __init__(self, settings: Settings, load: Load | None = None) -> None:
        self._load = load or (lambda version: serving.load(version, settings))
        self._limit = settings.loaded_models
        self._models: OrderedDict[str, Model] = OrderedDict()  # the most recently used last
        self._names: dict[str, tuple[str, ...]] = {}  # of versions whose record does not tell them
        self._loading: dict[str, Future[Model]] = {}
        self._failed: dict[str, tuple[float, str]] = {}  # no exceptions: they hold on to whoever they were raised to
        self._guard = threading.Lock()  # of the four above; never held while something loads
        self._loader = ThreadPoolExecutor(1, "load")

    def close(self) -> None:
        self._loader.shutdown(wait=False, cancel_futures=True)

    def count(self) -> int:
        """How many models are in memory."""
        with self._guard:
            return len(self._models)

    def names(self, version: Version) -> tuple[str, ...] | None:
        """The classes of a version where they are known without loading it."""
        if version.labels is not None:
            return version.labels
        with self._guard:
            return self._names.get(_key(version))

    def loaded(self, version: Version) -> bool:
        """Whether the version is in memory."""
        with self._guard:
            return _key(version) in self._models

    def failed(self, version: Version) -> bool:
        """Whether the version could not be loaded when it was last tried."""
        with self._guard:
            return _key(version) in self._failed

    def get(self, version: Version, deadline: float) -> Model:
        """The model of a version; waits for it until `deadline` (time.monotonic()).

        Raises YolonasError when it cannot be loaded, or not in time: then it goes on loading for the next request.
        """
        future = self.start_loading(version)
        try:
            return future.result(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise YolonasError(f"{version.name} is still being loaded; it will be asked again") from None

    def start_loading(self, version: Version) -> Future[Model]:
        """Have the version loaded by the one loading thread, unless it is, or just failed to; waits for nothing."""
        key = _key(version)
        with self._guard:
            if key in self._loading:
                return self._loading[key]
            done: Future[Model] = Future()
            if key in self._models:
                self._models.move_to_end(key)
                done.set_result(self._models[key])
                return done
            if key in self._failed and time.monotonic() - self._failed[key][0] < FAILED_LOAD_SECONDS:
                done.set_exception(YolonasError(self._failed[key][1]))
                return done
            self._loading[key] = self._loader.submit(self._load_one, key, version)
            return self._loading[key]

    def _load_one(self, key: str, version: Version) -> Model:
        begin = time.monotonic()
        try:
            model = self._load(version)
        except Exception as error:
            metrics.model_load_failures.inc()
            failure = YolonasError(f"{version.name} could not be loaded: {error}")
            if not isinstance(error, YolonasError):
                logger.exception("%s could not be loaded", version.name)
            with self._guard:
                self._failed[key] = (time.monotonic(), str(failure))
                del self._loading[key]
            raise failure from error
        metrics.model_load_seconds.observe(time.monotonic() - begin)
        logger.info("%s is loaded, in %.1f s", version.name, time.monotonic() - begin)
        with self._guard:
            self._models[key] = model
            if version.labels is None:
                self._names[key] = tuple(model.names)
            self._failed.pop(key, None)
            del self._loading[key]
            while len(self._models) > self._limit:
                self._models.popitem(last=False)  # who is using it right now keeps it until done
        return model


def _key(version: Version) -> str:
    if version.trained or version.weights == UNTRAINED:
        return version.name
    return f"{version.weights} {version.record.get('stamp')}"
