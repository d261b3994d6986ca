"""Tasks in, predictions out: label configs, versions, and what became of each task."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from labelstudio_backend import logs, metrics
from labelstudio_backend.acquisition import Acquisition, of_control
from labelstudio_backend.asked import Asked, level_of
from labelstudio_backend.client import project_uid
from labelstudio_backend.mapping import describe, mapped, own_labels, served_controls
from labelstudio_backend.media import MediaCache
from labelstudio_backend.models import Load, Model, Models
from labelstudio_backend.notices import Notices
from labelstudio_backend.owed import Owed
from labelstudio_backend.registry import ProjectRegistry, Registry, project_key
from labelstudio_backend.scheduler import Level, Picture, Scheduler
from labelstudio_backend.settings import Settings
from labelstudio_backend.tag_weights import by_weights, start_weights
from labelstudio_backend.version import MissingVersionError, RegistryError, Version
from labelstudio_backend.video import NotReachedError, Videos, lowest_score, tracks
from yolonas.active_learning import SIGNALS_CONF, disagreement, mirrored
from yolonas.errors import YolonasError
from yolonas.inference.video import Frame
from yolonas.labelstudio import (
    Control,
    LabelConfigError,
    LabelMap,
    map_labels,
    to_regions,
)

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections
    from yolonas.inference.signals import ImageSignals

logger = logging.getLogger(__name__)


class BadRequestError(YolonasError):
    """A request whose body is not what Label Studio sends."""


@dataclass
class _Image:
    """One picture or video of one task: several controls may look at it."""

    task: int  # index in the request
    value: str
    controls: list[int] = field(default_factory=list)
    video: bool = False


@dataclass
class _Found:
    """What a task is answered with, and what the model said of each of its images."""

    regions: list[dict[str, Any]] = field(default_factory=list)
    signals: list[ImageSignals] = field(default_factory=list)


class Service:
    """Answers /setup, /predict and /versions. Thread-safe; only predict() and preload() ever wait for a model."""

    def __init__(self, settings: Settings, registry: Registry, media: MediaCache, *, load: Load | None = None) -> None:
        self.settings = settings
        self.registry = registry
        self.media = media
        self.models = Models(settings, load)
        self.videos = Videos(settings)
        self.scheduler = Scheduler(settings.batch)
        self.acquisition = Acquisition(settings.acquisition)
        self._answered: dict[str, Version] = {}  # with which version each project was last answered
        self._told: dict[str, str] = {}
        self._telling = threading.Lock()  # of _told
        self._closing = False
        self.notices = Notices()

    def close(self) -> None:
        """Stop the threads; requests that are being worked on end with what is done."""
        self._closing = True
        self.models.close()
        self.scheduler.close()
        self.videos.close()

    def preload(self, key: str, seconds: float = 600.0) -> None:
        """Load a project's current version now, so that the first request under it is quick."""
        self.models.get(self.registry.project(key).current(), time.monotonic() + seconds)

    def start_loading(self, key: str) -> None:
        """Have a project's current version loaded in the background, if it is not."""
        with contextlib.suppress(RegistryError):
            self.models.start_loading(self.registry.project(key).current())

    def warm(self) -> None:
        """Start loading what the known projects serve, in the background; what cannot be loaded is logged now."""

        def log(future: Future[Model]) -> None:
            if not future.cancelled() and (error := future.exception()) is not None:
                logger.error("%s", error)

        recent = sorted(self.registry.projects(), key=lambda project: project.seen_at(), reverse=True)
        for project in recent[: self.settings.loaded_models]:
            with contextlib.suppress(RegistryError):
                self.models.start_loading(project.current()).add_done_callback(log)

    # -- /setup, /versions -------------------------------------------------------------------------------------

    def setup(self, body: Mapping[str, Any]) -> dict[str, str]:
        """Make the project known and name its current version. Raises BadRequestError, RegistryError.

        Waits for no model; where the classes are not known yet, one starts loading so that the mapping can be logged.
        """
        uid, hostname, schema = body.get("project"), body.get("hostname"), body.get("schema")
        if not isinstance(uid, str) or not isinstance(hostname, str | None) or not isinstance(schema, str | None):
            raise BadRequestError('/setup needs the texts "project" ("ID.timestamp"), "hostname" and "schema"')
        project = self._register(hostname or "", uid, schema)
        controls = self._controls(project, schema if schema is not None else project.label_config)
        version = self._serving(project, self._start(project, controls))
        self._tell_mapping_soon(project, version, controls)
        return {"model_version": version.name}

    def _serving(self, project: ProjectRegistry, current: Version) -> Version:
        """The version to answer with: the current one, but while that is being loaded the one before goes on.

        Not once Label Studio was told of the current one, which another server may have loaded and told sooner: then
        what is answered under the name of before would be a second prediction that nobody is shown.
        """
        before = self._answered.get(project.key, current)
        if before.name != current.name and self.models.loaded(before) and not self.models.loaded(current):
            self.models.start_loading(current)
            if project.told() != current.name:
                return before
        self._answered[project.key] = current
        return current

    def versions(self) -> dict[str, list[str]]:
        """All versions of all projects; Label Studio names no project when it asks."""
        return {"versions": [name for project in self.registry.projects() for name in project.names()]}

    def project_of(self, payload: Mapping[str, Any]) -> ProjectRegistry | None:
        """The project that a webhook is about, None where it is not known.

        Nothing else of the event is used: events come late and out of order, and the reconciler asks for what is true.
        """
        about = payload.get("project")
        if not isinstance(about, Mapping):
            return None
        try:
            return self.registry.find(project_uid(about))
        except (KeyError, ValueError, OverflowError):
            return None

    def _register(self, hostname: str, uid: str, schema: str | None) -> ProjectRegistry:
        try:
            key = project_key(hostname, uid)
        except ValueError as error:
            raise BadRequestError(str(error)) from None
        try:
            project = self.registry.register(hostname, uid, schema)
            project.touch()
        except OSError as error:  # a full disk: what is known goes on serving
            logger.error("project %s: its state could not be written (%s); free some disk space", key, error)
            project = self.registry.project(key)
        return project

    def _start(self, project: ProjectRegistry, controls: list[Control]) -> Version:
        weights, tags = start_weights(controls, self.settings.weights)
        return project.ensure_start(weights, _labels(controls), tags)

    def _controls(self, project: ProjectRegistry, label_config: str | None) -> list[Control]:
        """The tags of the label config that want predictions; none, logged, where there is nothing to do."""
        try:
            controls = served_controls(label_config)
        except LabelConfigError as error:
            self._tell(project.key, f"no predictions: {error}")
            return []
        if not controls:
            wanted = '<RectangleLabels> on an <Image value="$..."> nor <VideoRectangle> and <Labels> on a <Video>'
            self._tell(project.key, f"no predictions: the label config has no {wanted}")
        return controls

    def _tell_mapping(self, project: ProjectRegistry, version: Version, controls: list[Control]) -> None:
        """Log, once for each change, which classes of the model become which labels, as far as they are known."""
        found = mapped(controls, version, self.models.names)
        if found and all(one.version is None or one.names is not None for one in found):
            self._tell(project.key, f"serves {version.name}: {'; '.join(describe(found, version))}")

    def _tell_mapping_soon(self, project: ProjectRegistry, version: Version, controls: list[Control]) -> None:
        """Log the mapping now where the classes are known, else when the model, loading from now on, tells them."""

        def loaded(future: Future[Model]) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is not None:
                self._tell(project.key, f"no predictions: {error}", logging.ERROR)
            else:
                self._tell_mapping(project, version, controls)

        self._tell_mapping(project, version, controls)
        for served, _ in by_weights(version, controls) if not self._closing else ():
            if self.models.names(served) is None:  # one that has left memory is not loaded again for this
                self.models.start_loading(served).add_done_callback(loaded)

    def _tell(self, key: str, message: str, level: int = logging.INFO) -> None:
        """Log what concerns a project, once for as long as it stays so."""
        with self._telling:
            if self._told.get(key) == message:
                return
            self._told[key] = message
        logger.log(level, "project %s: %s", key, message)

    # -- /predict ----------------------------------------------------------------------------------------------

    def predict(self, body: Mapping[str, Any], gone: Future[None] | None = None) -> dict[str, list[Any]]:
        """Predictions of the tasks, in order, one element for each, whatever happens.

        An element is a prediction, whose `result` is empty when the model looked and found nothing, or `[]` when the
        task failed or was not reached in `predict_seconds`: Label Studio then asks again later. `gone` is done once
        nobody waits for the answer any more. Raises BadRequestError.
        """
        tasks, uid, label_config = body.get("tasks"), body.get("project"), body.get("label_config")
        if not isinstance(tasks, list) or not all(isinstance(task, Mapping) for task in tasks):
            raise BadRequestError('/predict needs "tasks", a list of objects')
        if not isinstance(uid, str) or not isinstance(label_config, str | None):
            raise BadRequestError('/predict needs the texts "project" ("ID.timestamp") and "label_config"')
        try:
            project = self.registry.find(uid)
            if project is None:  # interactive requests come without a /setup before them
                project = self._register(self.settings.label_studio_url, uid, label_config)
            wanted = label_config if label_config is not None else project.label_config
            asked = Asked(project, tasks, level_of(body), self.settings.predict_seconds, gone or Future())
            with logs.about(project=project.key):
                return {"results": self._predict(asked, self._controls(project, wanted))}
        except BadRequestError:
            raise
        except YolonasError as error:
            logger.error("project %s: no predictions: %s", uid, error)
        except Exception:
            logger.exception("project %s: no predictions", uid)
        return {"results": [[] for _ in tasks]}

    def _predict(self, asked: Asked, controls: list[Control]) -> list[Any]:
        project, tasks = asked.project, asked.tasks
        if not controls or not tasks:
            return [[] for _ in tasks]
        try:
            version = project.current()
        except MissingVersionError:  # no /setup yet
            version = self._start(project, controls)
        version = self._serving(project, version)
        owed, everyone = Owed(project), asked.numbers()
        if asked.level is Level.MANY and self.settings.can_train:
            owed.promise(everyone)
        try:
            results = self._answer(asked, version, controls)
        except Exception:
            if asked.level is not Level.DRAWING:
                owed.settle(everyone, everyone)
            raise
        if asked.level is not Level.DRAWING:  # whose answer Label Studio does not store
            owed.settle(everyone, everyone if asked.gone.done() else asked.numbers(asked.late | asked.passing))
        return results

    def _answer(self, asked: Asked, version: Version, controls: list[Control]) -> list[Any]:
        results: list[Any] = [[] for _ in asked.tasks]
        found = {index: _Found() for index in range(len(asked.tasks))}
        labels, anything = _labels(controls), False
        for served, members in by_weights(version, controls):
            try:
                model = self._loaded(asked, served)
            except YolonasError as error:
                if served.name == version.name or not self.models.failed(served):
                    raise
                logger.error("project %s: no boxes of a tag: %s", asked.project.key, error)  # the other tags go on
                continue
            self._tell_mapping(asked.project, version, controls)
            maps = {index: map_labels(controls[index], model.names, own=own_labels(served)) for index in members}
            if not any(label_map.to_label for label_map in maps.values()):
                continue
            anything = True
            used = {index: (controls[index], label_map) for index, label_map in maps.items()}
            seen = _images(asked, controls, members)
            self._look_at_images(asked, model, used, labels, [image for image in seen if not image.video], found)
            for video in seen:
                if video.video and video.task not in asked.reasons:
                    found[video.task].regions += self._tracks(asked, served, model, used, video)
        if not anything:
            return results
        done = {index: one for index, one in found.items() if index not in asked.reasons}
        scores = self.acquisition.task_scores(
            asked.project,
            version,
            labels,
            {index: asked.tasks[index] for index, one in done.items() if one.signals},
            {index: one.regions for index, one in done.items()},
            {index: one.signals for index, one in done.items()},
        )
        for index, one in done.items():
            score = scores.get(index)
            if score is None:
                score = self.acquisition.plain_score(version, index, asked.tasks[index], one.regions)
            results[index] = {"model_version": version.name, "score": score, "result": one.regions}
        asked.report(version.name, results)
        self._count(asked, results)
        return results

    def _loaded(self, asked: Asked, version: Version) -> Model:
        loading = self.models.start_loading(version)
        waited: tuple[Future[Any], ...] = (loading, asked.gone)
        wait(waited, asked.deadline - time.monotonic(), FIRST_COMPLETED)
        if not loading.done():
            raise YolonasError(f"{version.name} is still being loaded; it will be asked again")
        return loading.result()

    def _look_at_images(
        self,
        asked: Asked,
        model: Model,
        controls: Mapping[int, tuple[Control, LabelMap]],
        labels: Sequence[str],
        images: list[_Image],
        found: Mapping[int, _Found],
    ) -> None:
        """Put what is found on the images into `found`; why nothing can be said of one, into `asked`."""
        default = model.checkpoint.conf
        looking = {index for image in images for index in image.controls}
        scored = {index: min(SIGNALS_CONF, controls[index][0].lowest_threshold(default)) for index in looking}
        conf = min(scored.values(), default=SIGNALS_CONF)  # fainter boxes push out none that is shown: best come first
        pictures = [asked.picture(image.task, image.value, self.media) for image in images]
        outcomes = self._detect(asked, model, pictures, conf)
        flips = self._flips(asked, model, images, pictures, outcomes, conf)
        for image, outcome, flip in zip(images, outcomes, flips, strict=True):
            if outcome is None:
                asked.not_reached(image.task)
            elif isinstance(outcome, BaseException):
                asked.failed(image.task, outcome)
            else:
                for index in image.controls:
                    control, label_map = controls[index]
                    found[image.task].regions += to_regions(outcome, control, label_map, score_threshold=default)
                    if asked.level is not Level.DRAWING:  # whose score Label Studio does not store
                        seen = of_control(outcome, label_map, labels, score_threshold=scored[index])
                        found[image.task].signals.append(replace(seen, disagreement=flip))

    def _flips(
        self,
        asked: Asked,
        model: Model,
        images: Sequence[_Image],
        pictures: Sequence[Picture],
        outcomes: Sequence[Detections | BaseException | None],
        conf: float,
    ) -> list[float | None]:
        """How far each image differs from its mirror image to the model, where the tasks are to be scored by that.

        It takes a second look, so it is for the strategy that lives on it, and for tasks that nothing was drawn on yet.
        """
        flips: list[float | None] = [None] * len(images)
        if self.acquisition.strategy != "disagreement" or asked.level is Level.DRAWING:
            return flips
        seen = {index: one for index, one in enumerate(outcomes) if not isinstance(one, BaseException | None)}
        new = [index for index in seen if not asked.tasks[images[index].task].get("predictions")]
        for index, other in zip(
            new, self._detect(asked, model, [_mirror_image(pictures[index]) for index in new], conf), strict=True
        ):
            if not isinstance(other, BaseException | None):
                flips[index] = disagreement(seen[index], mirrored(other))
        return flips

    def _detect(
        self, asked: Asked, model: Model, pictures: Sequence[Picture], conf: float
    ) -> list[Detections | BaseException | None]:
        """Detections of each picture, or why there are none, or None where it was not reached in time."""
        options = {
            "conf": conf,
            "iou": self.settings.iou or None,
            "max_det": self.settings.max_detections,
            "signals": True,
        }
        ticket = self.scheduler.submit(
            model, pictures, options, project=asked.project.key, level=asked.level, deadline=asked.deadline
        )
        asked.gone.add_done_callback(lambda _: self.scheduler.give_up(ticket))
        wait(ticket.futures, asked.deadline - time.monotonic())
        self.scheduler.give_up(ticket)
        wait(ticket.futures)
        return [None if future.cancelled() else future.exception() or future.result() for future in ticket.futures]

    def _tracks(
        self,
        asked: Asked,
        served: Version,
        model: Model,
        controls: Mapping[int, tuple[Control, LabelMap]],
        video: _Image,
    ) -> list[dict[str, Any]]:
        """The regions of a task's video; why there are none goes into `asked`."""
        if asked.gone.done() or time.monotonic() >= asked.deadline:
            asked.not_reached(video.task)
            return []
        default, used = model.checkpoint.conf, [controls[index] for index in video.controls]
        conf = lowest_score((control for control, _ in used), default)

        def detect(frames: list[Frame]) -> list[Detections | str | None]:
            pictures = [Picture((frame.path, frame.index), partial(_pixels, frame)) for frame in frames]
            found = self._detect(asked, model, pictures, conf)
            return [str(one) if isinstance(one, BaseException) else one for one in found]

        data = asked.tasks[video.task].get("data") or {}
        try:
            number = asked.number(video.task)
            looked = self.videos.look(
                self.videos.file(
                    (asked.project.key, video.value),
                    lambda: self.media.fetch(
                        video.value, task_id=number, uid=asked.uid, hostname=asked.hostname, video=True
                    ),
                    asked.deadline,
                    asked.gone,
                ),
                f"{served.name} {conf}",
                model.names,
                detect,
                asked.deadline,
                level=asked.level,
                gone=asked.gone,
            )
            rates = [control.frames_per_second(data) for control, _ in used]
            found = [
                tracks(looked, control, label_map, rate=rate, default_threshold=default)
                for (control, label_map), rate in zip(used, rates, strict=True)
            ]
            return [region for regions in found for region in regions]
        except NotReachedError as error:
            asked.late.add(video.task)
            asked.reasons[video.task] = str(error)
        except YolonasError as error:
            asked.failed(video.task, error)
        except Exception as error:
            logger.exception("task %s: its video failed", asked.number(video.task))
            asked.reasons[video.task] = f"its video failed ({type(error).__name__}: {error})"
        return []

    def _count(self, asked: Asked, results: list[Any]) -> None:
        """For the metrics and the dashboard."""
        metrics.tasks.labels("predicted").inc(sum(isinstance(result, dict) for result in results))
        metrics.tasks.labels("late").inc(len(asked.late))
        reasons = (reason for index, reason in asked.reasons.items() if index not in asked.late)
        for reason, times in Counter(reasons).items():
            metrics.tasks.labels(metrics.outcome(reason)).inc(times)
            self.notices.note(asked.project.key, f"No prediction: {reason}", times)


def _mirror_image(picture: Picture) -> Picture:
    return Picture(("mirrored", picture.key), lambda: np.ascontiguousarray(picture.read()[:, ::-1]))


def _labels(controls: list[Control]) -> list[str]:
    return list(dict.fromkeys(label for control in controls for label in control.labels))


def _pixels(frame: Frame) -> np.ndarray:
    return frame.image


def _images(asked: Asked, controls: list[Control], members: list[int]) -> list[_Image]:
    """The pictures and videos that these controls look at; a task without one gets its reason into `asked`."""
    images: list[_Image] = []
    for index, task in enumerate(asked.tasks):
        data = task.get("data")
        found: dict[tuple[str, str], _Image] = {}
        for number in members:
            control = controls[number]
            value = control.task_value(data) if isinstance(data, Mapping) else None
            if value is None:
                asked.reasons[index] = (
                    f'its data has no text under "{control.data_key}", where the label config looks for the '
                    f"{control.media}"
                )
                break
            image = _Image(index, value, video=control.media == "video")
            found.setdefault((control.media, value), image).controls.append(number)
        else:
            images += found.values()
    return images
