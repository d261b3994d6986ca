"""One training, as a process of its own: corrected tasks -> data set -> trainer -> gate -> registry.

`python -m labelstudio_backend.training_job JOB` is what the server starts; settings come by the environment. Whatever
goes wrong, the old version goes on serving and the job carries the reason.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from labelstudio_backend.client import LabelStudio, LabelStudioError
from labelstudio_backend.corrections import (
    class_names,
    class_sources,
    corrections,
    held_out,
    labelled_images,
    manifest,
)
from labelstudio_backend.gate import Verdict, judge, rename
from labelstudio_backend.jobs import Job, Jobs
from labelstudio_backend.media import MediaCache
from labelstudio_backend.reconcile import same_project
from labelstudio_backend.registry import ProjectRegistry, Registry, Version, load_checkpoint
from labelstudio_backend.settings import UNTRAINED, Settings
from yolonas.data.labelled import LabelledImage, LabelledImages
from yolonas.errors import YolonasError
from yolonas.labelstudio import Control, map_labels, parse_label_config

if TYPE_CHECKING:
    from yolonas.evaluation import Metrics

log = logging.getLogger(__name__)

NICENESS = 10  # predictions come first
STOPPED = 75  # EX_TEMPFAIL: asked to end by SIGTERM
THRESHOLD_BOXES = 20  # with fewer held-out boxes the operating threshold is taken from training images
HIGHEST_GUESS = 0.25  # and then not above this, as scores are too good on what was trained on
# Shares of the job's progress at which pulling, fetching and training end.
PULLED, FETCHED, TRAINED = 0.02, 0.1, 0.9


class _StoppedError(Exception):
    """SIGTERM came."""


@dataclass
class _Data:
    """What a job learns from; kept in its folder, so that a restart goes on with the same."""

    names: tuple[str, ...]
    sources: dict[str, str]
    train: LabelledImages
    test: LabelledImages
    tasks: dict[str, Any]  # counts, for the record
    manifest: dict[str, dict[str, Any]]  # task -> annotation and part, for the record


def main(arguments: Sequence[str]) -> int:
    """Run the job whose number is the one argument; returns the exit code."""
    os.nice(NICENESS)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded: waiting threads sleep
    import torch

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    # One core is left to predictions. A thread on a core that others use holds up all the others at every barrier: on
    # two cores with other work a training made 1 to 5 images/s with two threads, 14 with one.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    settings = Settings()
    return run(int(arguments[0]), settings, Jobs(settings.state_dir / "jobs.sqlite"), stop.is_set)


def run(job_id: int, settings: Settings, jobs: Jobs, should_stop: Callable[[], bool]) -> int:
    """Run a job to its end and write that down; returns the exit code, `STOPPED` where it was cut."""
    job = jobs.get(job_id)
    if job is None or job.state != "running":
        log.error("job %d is not there, or not to be run", job_id)
        return 2
    try:
        with LabelStudio(settings.label_studio_url, settings.token) as client:
            _Training(job, settings, jobs, client, should_stop).run()
    except _StoppedError:
        return STOPPED
    except Exception as error:
        if should_stop():
            log.info("stopped while: %s", error)
            return STOPPED
        log.exception("job %d failed", job_id)
        jobs.finish(job_id, "failed", _sentence(error))
        _tidy(jobs.folder(job_id))
        return 1
    _tidy(jobs.folder(job_id))
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full ({error.filename or error}); free some space and train again"
    if isinstance(error, YolonasError):
        return str(error)
    return f"{type(error).__name__}: {error}; the job's log.txt has the details"


def _tidy(folder: Path) -> None:
    """Remove what only a running job needs: images, checkpoints. Log, curves and data set list stay."""
    for name in ("images", "training/resume.pt", "training/best.safetensors", "training/last.safetensors"):
        shutil.rmtree(folder / name, ignore_errors=True) if name == "images" else (folder / name).unlink(True)
    (folder / "model.safetensors").unlink(missing_ok=True)


class _Training:
    def __init__(
        self, job: Job, settings: Settings, jobs: Jobs, client: LabelStudio, should_stop: Callable[[], bool]
    ) -> None:
        self.job, self.settings, self.jobs, self.client, self.should_stop = job, settings, jobs, client, should_stop
        self.folder = jobs.folder(job.id)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.project: ProjectRegistry = Registry(settings.state_dir / "projects").project(job.project)
        self.begun = time.monotonic()

    def run(self) -> None:
        published = next((v for v in self.project.versions() if v.record.get("job") == self.job.id), None)
        if published is not None:  # killed between publishing and writing it down
            self.jobs.finish(self.job.id, "succeeded", "published before a restart", version=published.name)
            return
        data = self._kept() or self._pull()
        base = self.project.current()
        artefact, training = self._train(data, base)
        verdict, before, after = self._gate(data, artefact, base)
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
            "seconds": round(time.monotonic() - self.begun, 1),
        }
        self._continue()
        if not verdict.publish:
            self.jobs.finish(self.job.id, "refused", f"{base.name} goes on: {verdict.reason}", record=record)
            log.info("refused: %s", verdict.reason)
        else:
            version = self.project.publish(artefact, {**record, "manifest": data.manifest})
            self.jobs.finish(self.job.id, "succeeded", verdict.reason, version=version.name, record=record)
            log.info("published %s: %s", version.name, verdict.reason)
        self._look_for_new_labels(data.names)

    def _continue(self) -> None:
        if self.should_stop():
            raise _StoppedError

    def _report(self, progress: float, reason: str) -> None:
        self._continue()
        self.jobs.report(self.job.id, progress=progress, reason=reason)

    # -- the data --------------------------------------------------------------------------------------------------

    def _controls(self) -> list[Control]:
        state = self.client.get_project(self.project.project_id)
        if not same_project(state, str(self.project.metadata().get("uid", ""))):
            raise YolonasError(
                f"project {self.project.project_id} of {self.client.url} is another one than this backend knows; "
                "connect the backend to it anew"
            )
        return [control for control in parse_label_config(state["label_config"]) if not control.skip]

    def _pull(self) -> _Data:
        self._report(0.0, "pulling the annotations")
        controls = self._controls()
        names = class_names(controls)
        if not names:
            raise YolonasError("the label config has no RectangleLabels on an Image, so there is nothing to learn")
        found = corrections(self.client.iter_tasks(self.project.project_id, only_annotated=True))
        self.jobs.report(self.job.id, manifest=manifest(found))
        if not found:
            raise YolonasError("no task is labelled yet; submit some annotations and train again")
        fraction = self.settings.held_out
        test_tasks = [c for c in found if held_out(self.project.key, c.task, fraction)]
        train_tasks = [c for c in found if not held_out(self.project.key, c.task, fraction)]
        hostname = str(self.project.metadata().get("hostname", ""))
        media = MediaCache(self.settings, self.client)

        def fetch(value: str, task: int) -> Path:
            self._continue()
            return media.fetch(value, task_id=task, hostname=hostname)

        done = 0

        def on_image(_: int, __: int) -> None:
            nonlocal done
            done += 1
            if done % 10 == 0:
                share = PULLED + (FETCHED - PULLED) * done / len(found)
                self._report(min(share, FETCHED), f"fetched {done} of {len(found)} images")

        images = self.folder / "images"
        try:
            train = labelled_images(train_tasks, controls, fetch, images, on_image=on_image)
            test = labelled_images(test_tasks, controls, fetch, images, on_image=on_image)
        finally:
            media.close()
        dropped = train.dropped + test.dropped
        if train.objects == 0:
            raise YolonasError(_nothing_to_learn(train, test, len(found), dropped))
        data = _Data(
            names=names,
            sources=class_sources(controls),
            train=train,
            test=test,
            tasks={
                "labelled": len(found),
                "train": len(train),
                "held_out": len(test),
                "negatives": sum(len(i.boxes) == 0 for i in train.images + test.images),
                "train_boxes": train.objects,
                "held_out_boxes": test.objects,
                "unusable": len(dropped),
                "unusable_because": dropped[:20],
            },
            manifest={
                str(c.task): {
                    "annotation": c.annotation.get("id"),
                    "updated_at": c.annotation.get("updated_at"),
                    "part": part,
                }
                for part, tasks in (("train", train_tasks), ("held_out", test_tasks))
                for c in tasks
            },
        )
        self._keep(data)
        log.info("data: %s", data.tasks)
        return data

    def _keep(self, data: _Data) -> None:
        document = {
            "names": data.names,
            "sources": data.sources,
            "tasks": data.tasks,
            "manifest": data.manifest,
            **{part: [_to_json(i) for i in getattr(data, part).images] for part in ("train", "test")},
        }
        path = self.folder / "data.json"
        temporary = path.with_suffix(".part")
        temporary.write_text(json.dumps(document))
        temporary.replace(path)

    def _kept(self) -> _Data | None:
        """The data of this job's earlier life, where it is whole."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            document = json.loads((self.folder / "data.json").read_text())
            names = tuple(document["names"])
            train, test = (LabelledImages(names, [_from_json(i) for i in document[part]]) for part in ("train", "test"))
            if all(image.path.exists() for image in train.images + test.images):
                log.info("going on with the data pulled before")
                return _Data(names, document["sources"], train, test, document["tasks"], document["manifest"])
        return None

    # -- the model -------------------------------------------------------------------------------------------------

    def _train(self, data: _Data, base: Version) -> tuple[Path, dict[str, Any]]:
        """Fine-tune from the version that serves; the artefact that would serve, and what the record says of it."""
        from yolonas import checkpoint
        from yolonas.evaluation import best_f1_threshold, predict_dataset
        from yolonas.inference.detector import Detector
        from yolonas.inference.device import resolve_device
        from yolonas.training.recipe import Recipe
        from yolonas.training.report import EpochReport
        from yolonas.training.trainer import train

        self._report(FETCHED, "loading the model")
        scratch = not base.trained and base.weights == UNTRAINED
        start = load_checkpoint(base)
        variant = start.model.variant
        recipe = Recipe.auto(
            len(data.train),
            variant,
            str(resolve_device(self.settings.device)),
            self.settings.train_minutes * 60,
            from_scratch=scratch,
            image_size=self.settings.image_size,
        )

        def on_epoch(report: EpochReport) -> None:
            share = report.seconds / max(report.seconds + report.seconds_left, 1e-9)
            line = f"training: epoch {report.epoch}, {report.seconds_left:.0f} s left, loss {report.loss:.3f}"
            self._report(FETCHED + (TRAINED - FETCHED) * share, line)

        # No validation inside: the held-out images must not choose the epoch that they judge afterwards.
        result = train(
            data.train,
            LabelledImages(data.names, []),
            recipe=recipe,
            out_dir=self.folder / "training",
            start=None if scratch else start,
            variant=variant,
            resume=True,
            device=self.settings.device,
            class_sources=data.sources,
            on_epoch=on_epoch,
            should_stop=self.should_stop,
        )
        self._continue()
        self._report(TRAINED, "choosing the threshold")
        known = data.test.objects >= THRESHOLD_BOXES
        sample = data.test if known else LabelledImages(data.names, data.train.images[:50])
        threshold = best_f1_threshold(sample, predict_dataset(Detector(result.best, self.settings.device), sample))
        saved = checkpoint.load(result.best)
        saved.conf = threshold if known else min(threshold, HIGHEST_GUESS)
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
            "threshold_from": "held-out images" if known else "training images",
        }

    def _gate(
        self, data: _Data, artefact: Path, base: Version
    ) -> tuple[Verdict, dict[str, Any] | None, dict[str, Any] | None]:
        """Compare the file that would serve with the version that serves now, on the held-out images."""
        from yolonas import checkpoint
        from yolonas.evaluation import coco_ap
        from yolonas.inference.detections import Detections
        from yolonas.inference.detector import Detector

        self._report(TRAINED, f"comparing with {base.name} on {len(data.test)} held-out images")
        if data.test.objects == 0:
            return judge(data.test, [], []), None, None

        def detections(detector: Detector, own: bool) -> list[Detections]:
            control = Control("", "", "", data.names, {label: (name,) for label, name in data.sources.items()})
            to_label = map_labels(control, detector.names, own=own).to_label
            paths = [image.path for image in data.test.images]
            found = []
            for result in detector.stream(paths, conf=0.01):
                self._continue()
                result.image = None
                found.append(rename(result, data.names, to_label))
            return found

        after = detections(Detector(checkpoint.load(artefact), self.settings.device), own=True)
        own = base.trained or base.weights == UNTRAINED
        before = detections(Detector(load_checkpoint(base), self.settings.device), own=own)
        verdict = judge(data.test, before, after, first=not base.trained)
        return verdict, _figures(coco_ap(data.test, before)), _figures(coco_ap(data.test, after))

    def _look_for_new_labels(self, names: tuple[str, ...]) -> None:
        """The label config may have got new labels meanwhile: another training, which has them."""
        try:
            new = [name for name in class_names(self._controls()) if name not in names]
        except (LabelStudioError, YolonasError) as error:
            log.warning("whether the label config changed meanwhile is not known: %s", error)
            return
        if new:
            self.jobs.enqueue(self.job.project, f"new labels in the label config: {', '.join(new)}")


def _figures(metrics: Metrics) -> dict[str, Any]:
    per_class = {name: round(value, 4) for name, value in metrics.per_class.items()}
    return {"ap": round(metrics.ap, 4), "ap50": round(metrics.ap50, 4), "per_class": per_class}


def _nothing_to_learn(train: LabelledImages, test: LabelledImages, tasks: int, dropped: list[str]) -> str:
    if not train.images and not test.images and dropped:
        return f"no image of the {tasks} labelled tasks can be had: {dropped[0]}"
    if test.objects:
        return (
            f"the boxes of all {tasks} labelled tasks fall into the held-out part, by which new versions are judged; "
            "label a few more tasks"
        )
    return f"there is no box of the label config's labels in the {tasks} labelled tasks; draw some and train again"


def _to_json(image: LabelledImage) -> dict[str, Any]:
    return {
        "path": str(image.path),
        "boxes": image.boxes.tolist(),
        "labels": image.labels.tolist(),
        "size": [image.width, image.height],
        "id": image.image_id,
    }


def _from_json(value: dict[str, Any]) -> LabelledImage:
    boxes = np.array(value["boxes"], np.float32).reshape(-1, 4)
    labels = np.array(value["labels"], np.int64)
    width, height = value["size"]
    return LabelledImage(Path(value["path"]), boxes, labels, np.zeros(len(boxes), bool), width, height, value["id"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
