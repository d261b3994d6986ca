"""One training, as a process of its own: corrected tasks -> data set -> trainer -> exported file -> gate -> registry.

`python -m labelstudio_backend.training_job JOB` is what the server starts; settings come by the environment. Whatever
goes wrong, the old version goes on serving and the job carries the reason.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from labelstudio_backend import learnt, logs, serving
from labelstudio_backend.acceptance import fewest_edits_threshold
from labelstudio_backend.client import LabelStudio, same_project
from labelstudio_backend.corrections import corrections, manifest
from labelstudio_backend.gate import Verdict, judge, rename
from labelstudio_backend.job import STOPPED, Job, State, last_ap50, tidy
from labelstudio_backend.job_queue import JobQueue, QueueError
from labelstudio_backend.job_runner import finish_published
from labelstudio_backend.jobs import open_jobs
from labelstudio_backend.label_studio_http import LabelStudioError
from labelstudio_backend.mapping import served_controls
from labelstudio_backend.media import MediaCache, MediaError
from labelstudio_backend.registry import ProjectRegistry, Registry
from labelstudio_backend.serving import Way
from labelstudio_backend.settings import UNTRAINED, Settings
from labelstudio_backend.training_data import TrainingData, build
from labelstudio_backend.version import Version, load_checkpoint
from yolonas.active_learning import SIGNALS_CONF
from yolonas.data.labelled import LabelledImages
from yolonas.errors import CheckpointError, YolonasError
from yolonas.labelstudio import Control, class_names, map_labels, parse_label_config

if TYPE_CHECKING:
    from yolonas.evaluation import Metrics
    from yolonas.inference.detector import Detector

log = logging.getLogger(__name__)
T = TypeVar("T")

NICENESS = 10  # predictions come first
CANCEL_SECONDS = 1.0  # how often a training looks whether it is cancelled
PATIENCE_SECONDS = 120.0  # with Label Studio, an image's host or a queue that does not answer: it may be restarting
AGAIN_SECONDS = 2.0  # until it is asked again
# Images that choose the operating threshold: held-out ones, and where those are fewer, training images. On BCCD two
# held-out images chose 0.725, which saved 15 % of the edits on the test images, 15 of them 0.65 (26 %); with training
# images 0.575 (29 %) and 0.625 (27 %), where the best were 0.575 and 0.575.
THRESHOLD_IMAGES = 50
WATCHED_IMAGES = 25  # held-out ones, at most, that show the accuracy on the way
STOP_SECONDS = 1.0  # for a training to end by itself when it is told to
# Shares of the job's progress at which pulling, fetching and training end.
PULLED, FETCHED, TRAINED = 0.02, 0.1, 0.9


class _StoppedError(BaseException):
    """SIGTERM came; no Exception, so that nobody on the way takes it for a failure."""


def main(arguments: Sequence[str]) -> int:
    """Run the job whose number is the one argument; returns the exit code."""
    os.nice(NICENESS)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: waiting threads sleep
    import torch

    settings = Settings()
    logs.configure(settings.log_format, job=int(arguments[0]))
    # One core is left to predictions. A thread on a core that others use holds up all the others at every barrier: on
    # two cores with other work a training made 1 to 5 images/s with two threads, 14 with one.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    job_id, jobs = int(arguments[0]), open_jobs(settings)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_watch_cancel, args=(jobs, job_id, stop), daemon=True).start()
    return run(job_id, settings, jobs, stop.is_set, leave=os._exit)


def _watch_cancel(jobs: JobQueue, job_id: int, stop: threading.Event) -> None:
    """Ask this process to end when its job is cancelled, whoever runs it and on whatever machine."""
    while not stop.wait(CANCEL_SECONDS):
        with contextlib.suppress(Exception):  # a busy database, or Redis away: looked at again
            job = jobs.get(job_id)
            if job is None or job.cancel:
                stop.set()


def run(
    job_id: int,
    settings: Settings,
    jobs: JobQueue,
    should_stop: Callable[[], bool],
    *,
    leave: Callable[[int], object] | None = None,
) -> int:
    """Run a job to its end and write that down; returns the exit code, `STOPPED` where it was cut.

    `leave` ends the process with this code at once; it is used where nothing can look at `should_stop`.
    """
    job = jobs.get(job_id)
    if job is None or job.state != "running":
        log.error("job %d is not there, or not to be run", job_id)
        return 2
    try:
        with LabelStudio(settings.label_studio_url, settings.token) as client:
            training = _Training(job, settings, jobs, client, should_stop)
            training.leave = leave
            training.run()
    except _StoppedError:
        return STOPPED
    except Exception as error:
        if should_stop():
            log.info("stopped while: %s", error)
            return STOPPED
        log.exception("job %d failed", job_id)
        if _is_full(error):
            tidy(jobs.folder(job_id))  # first, as a full disk takes no last word
        jobs.finish(job_id, "failed", _sentence(error))
        return 1
    tidy(jobs.folder(job_id))
    return 0


def _is_full(error: Exception) -> bool:
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    cause = error.__cause__
    return (
        full
        or (isinstance(error, sqlite3.Error) and "disk is full" in str(error))
        or (isinstance(cause, Exception) and _is_full(cause))
    )


def _sentence(error: Exception) -> str:
    if _is_full(error) and not isinstance(error, YolonasError):
        return f"the disk is full ({getattr(error, 'filename', None) or error}); free some space and train again"
    if isinstance(error, YolonasError):
        return str(error)
    return f"{type(error).__name__}: {error}; the job's log.txt has the details"


class _Training:
    def __init__(
        self, job: Job, settings: Settings, jobs: JobQueue, client: LabelStudio, should_stop: Callable[[], bool]
    ) -> None:
        self.job, self.settings, self.jobs, self.client, self.should_stop = job, settings, jobs, client, should_stop
        self.folder = jobs.folder(job.id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.resume_file = self.folder / "training" / "resume.pt"
        self.project: ProjectRegistry = Registry(settings.projects_dir).project(job.project)
        self.begun = time.monotonic()
        self.curve = list(job.curve)
        self.leave: Callable[[int], object] | None = None

    def run(self) -> None:
        with contextlib.ExitStack() as used:
            self._run(used)

    def _run(self, used: contextlib.ExitStack) -> None:
        if finish_published(self.jobs, Registry(self.settings.projects_dir), self.job):
            return
        data, base = self._data()
        used.enter_context(base.in_use())
        with self._left_at_once(STOP_SECONDS):  # a measurement looks at `should_stop` only when it is over
            artefact, training = self._train(data, base)
        ways, remarks = self._ways(data, artefact)
        way, verdict, before, after = self._gate(data, ways, remarks, base)
        record = {
            "job": self.job.id,
            "trigger": self.job.trigger,
            "base": base.name,
            "labels": list(data.names),
            "tasks": data.tasks,
            "training": training,
            "gate": verdict.to_dict(),
            "before": before,
            "after": after,
            "serving": {
                "file": way.file.name,
                "runtime": way.runtime,
                "precision": way.precision,
                "asked": serving.runtime_of(self.settings),
                "remarks": remarks,
            },
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        self._continue()
        reason = "; ".join([verdict.reason, *remarks])
        if not verdict.publish:
            self._finish("refused", f"{base.name} goes on: {reason}", record=record)
            log.info("refused: %s", reason)
        else:
            files = [*([] if way.file == artefact else [way.file]), *self._features(data, way)]
            version = self.project.publish(artefact, {**record, "manifest": data.manifest}, files, base=base.number)
            if (current := self.project.current().number) < version.number:
                why = "is pinned" if self.project.pinned() else "was chosen meanwhile"
                reason = f"{version.name} is a candidate and does not serve, as v{current} {why}: {reason}"
            self._finish("succeeded", reason, version=version.name, record=record)
            log.info("published %s, %s: %s", version.name, way, reason)
        self._prune()
        self._look_for_new_labels(data.names)

    def _prune(self) -> None:
        """Remove old versions, and old jobs that no version tells about."""
        keep = self.settings.keep_versions
        try:
            for version in self.project.retain(keep):
                log.info("removed the files of %s: %d newer versions are there", version.name, keep)
        except OSError as error:
            log.warning("old versions could not be removed: %s", error)
        made = {version.record.get("job", 0) for version in self.project.versions() if not version.removed}
        self.jobs.prune(self.project.key, keep=made)

    def _finish(self, state: State, reason: str, **more: Any) -> None:
        _patiently(lambda: self.jobs.finish(self.job.id, state, reason, **more))

    def _continue(self) -> None:
        if self.should_stop():
            raise _StoppedError

    def _report(self, progress: float, reason: str, **more: Any) -> None:
        self._continue()
        try:
            self.jobs.report(self.job.id, progress=progress, reason=reason, **more)
        except QueueError as error:  # no reason to end a training
            log.warning("%s", error)

    def _ask(self, work: Callable[[], T]) -> T:
        """Do it patiently, unless the job is to end."""

        def once() -> T:
            self._continue()
            return work()

        return _patiently(once)

    # -- the data --------------------------------------------------------------------------------------------------

    def _controls(self) -> list[Control]:
        state = self.client.get_project(self.project.project_id)
        if not same_project(state, str(self.project.metadata().get("uid", ""))):
            raise YolonasError(
                f"project {self.project.project_id} of {self.client.url} is another one than this backend knows; "
                "connect the backend to it anew"
            )
        return [control for control in parse_label_config(state["label_config"]) if not control.skip]

    def _data(self) -> tuple[TrainingData, Version]:
        """The data and the base of this job's earlier life, where they are whole, else what there is now."""
        path = self.folder / "data.json"
        if (kept := TrainingData.load(path)) is not None:
            base = self.project.current()
            if base.name == kept.base:  # else it would be judged by what serves no more
                log.info("going on from %s with the data pulled before", base.name)
                return kept, base
        path.unlink(missing_ok=True)
        self.resume_file.unlink(missing_ok=True)  # of other data, or another base
        images = self.folder / "images"
        shutil.rmtree(images, ignore_errors=True)  # the tasks may have got others since
        base = self.project.current()
        self._report(0.0, "pulling the annotations")
        controls = self._ask(self._controls)
        number = self.project.project_id
        found = self._ask(lambda: corrections(self.client.iter_tasks(number, only_annotated=True)))
        _patiently(lambda: self.jobs.report(self.job.id, manifest=manifest(found)))
        uid, hostname = self.project.origin()
        media = MediaCache(self.settings, self.client)

        def fetch(value: str, task: int, video: bool = False) -> Path:
            return self._ask(lambda: media.fetch(value, task_id=task, uid=uid, hostname=hostname, video=video))

        def on_image(done: int) -> None:
            if done % 10 == 0:
                share = min(1.0, done / len(found))
                self._report(PULLED + (FETCHED - PULLED) * share, f"fetched {done} of {len(found)} images")

        try:
            fraction, fetch_video = self.settings.held_out, partial(fetch, video=True)
            data = build(found, controls, self.project.key, base.name, fraction, fetch, images, on_image, fetch_video)
        finally:
            media.close()
        data.save(path)
        log.info("data: %s", data.tasks)
        return data, base

    # -- the model -------------------------------------------------------------------------------------------------

    def _train(self, data: TrainingData, base: Version) -> tuple[Path, dict[str, Any]]:
        """Fine-tune from the version that serves; the artefact that would serve, and what the record says of it."""
        from yolonas import checkpoint
        from yolonas.evaluation import predict_dataset
        from yolonas.inference.detector import Detector
        from yolonas.inference.device import resolve_device
        from yolonas.training.recipe import Recipe
        from yolonas.training.report import EpochReport
        from yolonas.training.trainer import TrainResult, train

        self._report(FETCHED, "loading the model")
        scratch = not base.trained and base.weights == UNTRAINED
        start = load_checkpoint(base)
        variant = start.model.variant
        recipe = Recipe.auto(
            data.train,
            variant,
            str(resolve_device(self.settings.device)),
            self.settings.train_minutes * 60,
            start_size=None if scratch else max(start.model.preprocessing.image_size),
            image_size=self.settings.image_size,
        )

        def on_epoch(report: EpochReport) -> None:
            share = report.seconds / max(report.seconds + report.seconds_left, 1e-9)
            line = f"training: epoch {report.epoch}, {report.seconds_left:.0f} s left, loss {report.loss:.3f}"
            self.curve = [point for point in self.curve if point["epoch"] < report.epoch]  # of an earlier life
            self.curve.append({"epoch": report.epoch, "loss": round(report.loss, 4)})
            if report.ap50 is not None:
                self.curve[-1]["ap50"] = round(report.ap50, 4)
            if (known := last_ap50(self.curve)) is not None:
                line += f", AP50 {known:.3f}"
            done = FETCHED + (TRAINED - FETCHED) * share
            self._report(done, line, epoch=report.epoch, seconds_left=report.seconds_left, curve=self.curve)

        watch = _some(data.held_out, WATCHED_IMAGES)

        def fine_tune() -> TrainResult:
            # Shown, not for validation: the held-out images must not choose the epoch that they judge afterwards.
            return train(
                data.train,
                LabelledImages(data.names, []),
                recipe=recipe,
                out_dir=self.resume_file.parent,
                start=None if scratch else start,
                variant=variant,
                resume=True,
                device=self.settings.device,
                # a version trained here knows the labels by their own names
                class_sources={} if base.trained else _known_sources(data.sources, start.model.class_names),
                on_epoch=on_epoch,
                should_stop=self.should_stop,
                watch=watch if watch.objects else None,
            )

        try:
            result = fine_tune()
        except CheckpointError as error:  # its earlier life had other start weights, or another recipe
            if not self.resume_file.exists():
                raise
            log.warning("the training begins anew: %s", error)
            self.resume_file.unlink()
            result = fine_tune()
        self._continue()
        self._report(TRAINED, "choosing the threshold")
        held_out = data.held_out.images
        sample = LabelledImages(data.names, [*held_out, *data.train.images[: max(0, THRESHOLD_IMAGES - len(held_out))]])
        detector = Detector(result.best, self.settings.device, runtime="torch")
        saved = checkpoint.load(result.best)
        saved.conf = fewest_edits_threshold(sample, predict_dataset(detector, sample))
        saved.record = {**saved.record, "base": base.name, "project": self.project.key}
        artefact = self.folder / "model.safetensors"
        checkpoint.save(saved, artefact)
        return artefact, {
            "variant": variant,
            "recipe": recipe.to_dict(),
            "epochs": result.epochs,
            "seconds": round(result.seconds, 1),
            "images_per_second": round(result.images_per_second, 2),
            "threshold": round(saved.conf, 4),
            "threshold_from": f"{len(held_out)} held-out and {len(sample) - len(held_out)} training images",
        }

    def _ways(self, data: TrainingData, artefact: Path) -> tuple[list[Way], list[str]]:
        """How the new version could serve, the way that was asked for first; and a line on each that cannot be had."""
        self._report(TRAINED, "making the file that serves")
        folder = self.folder / "serving"
        folder.mkdir(exist_ok=True)
        paths = [image.path for image in data.train.images]
        with self._left_at_once():
            found, remarks = serving.ways(artefact, folder, paths, self.settings, self._continue)
        return found, remarks

    @contextlib.contextmanager
    def _left_at_once(self, after: float = 0.0) -> Iterator[None]:
        """Exporting and quantizing take minutes in other people's code, and leave nothing to save: end in its midst.

        So for a training, which is saved after each epoch, where it has not ended by itself `after` seconds.
        """
        over = threading.Event()

        def watch(leave: Callable[[int], object]) -> None:
            while not over.wait(0.2):
                if self.should_stop():
                    if not over.wait(after):
                        log.info("told to end; left")
                        leave(STOPPED)
                    return

        if self.leave is not None:
            threading.Thread(target=watch, args=(self.leave,), daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _gate(
        self, data: TrainingData, ways: Sequence[Way], remarks: list[str], base: Version
    ) -> tuple[Way, Verdict, dict[str, Any] | None, dict[str, Any] | None]:
        """Compare what would serve, see `serving.choose`, with what serves now, on the held-out images."""
        from yolonas.evaluation import coco_ap
        from yolonas.inference.detections import Detections

        self._report(TRAINED, f"comparing with {base.name} on {len(data.held_out)} held-out images")

        def detections(detector: Detector, own: bool) -> list[Detections]:
            control = Control("", "", "", data.names, data.sources)
            to_label = map_labels(control, detector.names, own=own).to_label
            # Where there is nothing to compare, one image still shows that the file works.
            images = data.held_out.images if data.held_out.objects else data.train.images[:1]
            found = []
            for result in detector.stream([image.path for image in images], conf=0.01):
                self._continue()
                result.image = None
                found.append(rename(result, data.names, to_label))
            return found

        way, after = serving.choose(
            ways, remarks, data.held_out, lambda way: detections(way.detector(self.settings.device), own=True)
        )
        if data.held_out.objects == 0:
            return way, judge(data.held_out, [], []), None, None
        figures = _figures(coco_ap(data.held_out, after))
        if self.curve:
            self.curve[-1]["ap50"] = figures["ap50"]
            self._report(TRAINED, f"comparing with {base.name}", curve=self.curve)
        own = base.trained or base.weights == UNTRAINED
        before = detections(serving.load(base, self.settings), own=own)
        verdict = judge(data.held_out, before, after, first=not base.trained)
        return way, verdict, _figures(coco_ap(data.held_out, before)), figures

    def _features(self, data: TrainingData, way: Way) -> list[Path]:
        """The file of what the new version sees in the images that it has learned from, where scores go by that."""
        if self.settings.acquisition not in learnt.COMPARING:
            return []
        self._report(TRAINED, "looking at what it has learned from")
        file = self.folder / "serving" / learnt.FEATURES
        try:
            detector = way.detector(self.settings.device)
            controls = served_controls(self.project.label_config)
            thresholds = [control.lowest_threshold(detector.checkpoint.conf) for control in controls]
            learnt.write_features(
                detector,
                [image.path for image in data.train.images + data.held_out.images],
                file,
                conf=min([SIGNALS_CONF, *thresholds]),
                iou=self.settings.iou or None,
                max_det=self.settings.max_detections,
                check=self._continue,
            )
        except Exception as error:  # it costs the order of the tasks, no version
            log.warning("what the new version sees in the images that it has learned from is not known: %s", error)
            return []
        return [file]

    def _look_for_new_labels(self, names: tuple[str, ...]) -> None:
        """The label config may have got new labels meanwhile: another training, which has them."""
        try:
            new = [name for name in class_names(self._controls()) if name not in names]
        except (LabelStudioError, YolonasError) as error:
            log.warning("whether the label config changed meanwhile is not known: %s", error)
            return
        if new:
            self.jobs.enqueue(self.job.project, f"new labels in the label config: {', '.join(new)}")


def _patiently(work: Callable[[], T]) -> T:
    """Do what a training cannot go without, again for two minutes where whoever is asked is away for a while."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return work()
        except (LabelStudioError, MediaError, QueueError) as error:
            passing = isinstance(error, QueueError) or error.passing
            if not passing or time.monotonic() > until:
                raise
            log.warning("%s; trying again", error)
            time.sleep(AGAIN_SECONDS)


def _known_sources(sources: Mapping[str, Sequence[str]], known: Sequence[str]) -> dict[str, str]:
    """Label -> the first of its classes that the base model knows, case aside; labels without one are left out."""
    folded = {name.casefold() for name in known}
    found = {label: [name for name in names if name.casefold() in folded] for label, names in sources.items()}
    return {label: names[0] for label, names in found.items() if names}


def _some(data: LabelledImages, most: int) -> LabelledImages:
    """At most so many of the images, spread over the data set."""
    count = min(len(data), most)
    return LabelledImages(data.names, [data.images[k * len(data) // count] for k in range(count)])


def _figures(metrics: Metrics) -> dict[str, Any]:
    per_class = {name: round(value, 4) for name, value in metrics.per_class.items()}
    return {"ap": round(metrics.ap, 4), "ap50": round(metrics.ap50, 4), "per_class": per_class}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
