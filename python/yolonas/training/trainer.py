"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from yolonas import checkpoint
from yolonas.checkpoint import Checkpoint
from yolonas.data.dataset import Batch, DrawSampler, TrainingSet, collate, start_worker
from yolonas.data.labelled import LabelledImages
from yolonas.errors import DataError, YolonasError
from yolonas.evaluation import Metrics, predict_dataset
from yolonas.inference.detections import Detections
from yolonas.inference.detector import Detector
from yolonas.inference.device import resolve_device
from yolonas.model import YoloNAS
from yolonas.training import distributed
from yolonas.training.distillation import Distiller
from yolonas.training.ema import ModelEMA
from yolonas.training.html_report import write_html
from yolonas.training.loss import DetectionLoss
from yolonas.training.network import Network
from yolonas.training.recipe import Recipe
from yolonas.training.report import EpochReport, write_csv
from yolonas.training.resume import RESUME_FILE, check_resume, read_resume, weights_checksum, write_resume
from yolonas.training.schedule import Schedule
from yolonas.training.snapshots import Snapshots
from yolonas.training.start import first_model, parameter_groups
from yolonas.training.validation import CALIBRATION_IMAGES, Validation

WATCH_SHARE = 0.1  # of the time, at most, for measurements that are only shown
FORWARD_SHARE = 0.5  # of a training step's time: a guess, until the first of them was measured
CLOSING_S = 4.0  # the files and the report after the last evaluation: 1.6 to 3.4 s on 87 images
REPORT_EVERY_S = 60.0  # the curves of a run that goes on


@dataclass(frozen=True)
class TrainResult:
    """A finished run: its checkpoints, the accuracy of `best` (None without validation images), and its cost."""

    best: Path
    last: Path
    metrics: Metrics | None
    epochs: int
    seconds: float
    images_per_second: float
    stopped: bool  # by should_stop, before its end


def train(
    train: LabelledImages,
    val: LabelledImages,
    *,
    recipe: Recipe,
    out_dir: Path,
    start: Checkpoint | None = None,
    teacher: Checkpoint | None = None,
    variant: str = "s",
    resume: bool = False,
    device: str | torch.device = "auto",
    class_sources: Mapping[str, str] | None = None,
    on_epoch: Callable[[EpochReport], None] | None = None,
    on_step: Callable[[int, int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    watch: LabelledImages | None = None,
) -> TrainResult:
    """Train a detector for the classes of `train`, from `start` or, without one, from random weights of `variant`.

    Writes into `out_dir`: best.safetensors (highest AP on `val`) and last.safetensors, both averaged weights with
    classes, preprocessing, record and the operating threshold measured on `val`; results.csv, report.html (the curves
    while the run goes on, what `best` does right and wrong at its end; see `write_html`) and resume.pt. Without
    validation images the last weights are the best. What is measured is the fused form, as a Detector makes it of the
    files. Classes that `start` knows by name, or through `class_sources` (new name -> known name), keep their
    predictor rows. With a `teacher` the loss also asks for its output, see `Distiller`.

    `watch` shows a run without validation images how accurate it is: after some of the epochs, in at most a tenth of
    the time, the averaged weights are measured on these images, for the reports alone. They choose nothing, and the
    weights of the same steps are the same without them.

    Started by torchrun, every process calls this with the same arguments and trains on its share of each batch;
    the first writes the files.

    `resume` goes on after the last whole epoch in `out_dir`, to the same weights as a run that was never stopped, and
    begins anew where there is none. All randomness is a function of the recipe's seed, the epoch and the sample, so no
    generator has a state to keep. `should_stop` is asked before every step; `on_step` is told the epoch, the steps
    done in it and how many it has.

    Raises DataError where there is nothing to learn from or `val` or `watch` has other classes, CheckpointError for a
    start or a resume file that does not fit, YolonasError when the loss is not finite or the device's memory is full,
    ValueError where both `val` and `watch` have images.
    """
    if watch is not None and watch.images and val.images:
        raise ValueError("give images as `val`, which choose the best weights, or as `watch`, which are only shown")
    with distributed.processes():
        run = _Run(
            train,
            val,
            recipe,
            Path(out_dir),
            resolve_device(device),
            start,
            teacher,
            variant,
            class_sources or {},
            watch,
        )
        run.on_epoch, run.on_step, run.should_stop = on_epoch, on_step, should_stop
        if resume:
            run.restore()
        elif run.writes:  # an older run's, which a later resume must not take up
            (run.out_dir / RESUME_FILE).unlink(missing_ok=True)
            run.snapshots.clear()
        stopped = run.loop()
        if not stopped:
            run.average_best()
            run.write_report()
        return run.result(stopped=stopped)


class _Run:
    """The state of one run."""

    on_epoch: Callable[[EpochReport], None] | None = None
    on_step: Callable[[int, int, int], None] | None = None
    should_stop: Callable[[], bool] | None = None

    def __init__(
        self,
        train: LabelledImages,
        val: LabelledImages,
        recipe: Recipe,
        out_dir: Path,
        device: torch.device,
        start: Checkpoint | None,
        teacher: Checkpoint | None,
        variant: str,
        class_sources: Mapping[str, str],
        watch: LabelledImages | None = None,
    ) -> None:
        if recipe.drop_empty:
            train = replace(train, images=[image for image in train.images if not image.crowd.all()])
        if not train.images:
            raise DataError(f"there is no image to train on{' that has an object' if recipe.drop_empty else ''}")
        self.train, self.val, self.recipe, self.device = train, val, recipe, device
        self.out_dir, self.best, self.last = out_dir, out_dir / "best.safetensors", out_dir / "last.safetensors"
        licenses = [one.license for one in (start, teacher if recipe.distillation else None) if one and one.license]
        self.license = "; and ".join(dict.fromkeys(licenses)) or None
        self.origin = f"random weights of {variant}" if start is None else "a checkpoint"
        self.writes = distributed.rank() == 0
        self.model: YoloNAS = first_model(start, variant, train.names, recipe, class_sources)
        self.first_weights = weights_checksum(self.model)
        self.model = self.model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.frozen = [part for part in recipe.freeze.split("+") if part != "none"]
        for name in self.frozen:
            getattr(self.model, name).requires_grad_(False)
        self.ema = ModelEMA(self.model, recipe.ema_decay)
        self.network = Network(self.model, device, recipe.precision, compiled=recipe.compile)
        self.validation = Validation(train, val, self.network, recipe.batch, self.frozen, watch)
        self.distiller: Distiller | None = None
        self.teacher_weights: int | None = None
        if teacher is not None and recipe.distillation:
            self.distiller = Distiller(teacher.model, self.model, device, self.network.dtype)
            self.teacher_weights = weights_checksum(teacher.model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.network.dtype == torch.float16)
        groups = parameter_groups(self.model, recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
        self.loss = DetectionLoss(len(train.names), reg_max=self.model.reg_max, strides=self.model.strides)

        augmented = TrainingSet(
            train,
            self.model.preprocessing,
            augmentation=recipe.augmentation,
            seed=recipe.seed,
            cache_bytes=recipe.cache_bytes // max(recipe.workers, 1),
        )
        self.sampler = DrawSampler(
            len(train),
            recipe.batch,
            seed=recipe.seed,
            min_samples=recipe.min_samples,
            rank=distributed.rank(),
            ranks=distributed.size(),
        )
        self.loader: DataLoader[Any] = DataLoader(
            augmented,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=recipe.workers,
            worker_init_fn=start_worker,
            persistent_workers=recipe.workers > 0,
            pin_memory=device.type == "cuda",
        )
        self.schedule = Schedule(recipe, len(self.sampler))
        self.snapshots = Snapshots(self.out_dir / "snapshots", recipe.average_best)
        self.epoch = 0
        self.train_seconds = 0.0
        self.look_seconds = self.last_look_seconds = 0.0  # of measurements on the watched images
        self.history: list[EpochReport] = []
        self.best_value = -1.0
        self.metrics: Metrics | None = None  # of the best checkpoint
        self.best_detections: list[Detections] | None = None

    def loop(self) -> bool:
        """Train to the end of the plan; returns whether `should_stop` ended it before."""
        if self.writes:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        told = -math.inf
        over = self.finished()
        while not over:
            losses = self.run_epoch()
            if losses is None:
                return True
            self.epoch += 1
            over = self.finished()
            due = over or self.epoch % self.recipe.evaluate_every == 0
            metrics = self.evaluate_and_save() if due else None
            report = self.report(losses, metrics or (None if over else self.look()))
            self.history.append(report)
            if self.writes:
                write_csv(self.out_dir / "results.csv", self.history)
                if time.monotonic() - told > REPORT_EVERY_S:
                    self.write_report(over=False)
                    told = time.monotonic()
                self.save_resume()
                if self.on_epoch is not None:
                    self.on_epoch(report)
            over = over or (due and self.finished())  # never on weights that were not evaluated
        return False

    def finished(self) -> bool:
        if self.recipe.patience and self.evaluations_since_best() >= self.recipe.patience:
            return True
        return self.epoch >= self.recipe.epochs or self.progress() >= 1

    def progress(self) -> float:
        return distributed.agree(self.schedule.progress())[0]

    def evaluations_since_best(self) -> int:
        values = list(self.values().values())
        return len(values) - 1 - values.index(max(values)) if values else 0

    def values(self) -> dict[int, float]:
        """The accuracy that the best is chosen by, of each evaluated epoch."""
        if not self.val.images:
            return {}
        found = ((report.epoch, getattr(report, self.recipe.select_by)) for report in self.history)
        return {epoch: value for epoch, value in found if value is not None}

    def run_epoch(self) -> Tensor | None:
        """One pass over the draws; the mean losses [4], or None where `should_stop` cut it."""
        self.model.train()
        for name in self.frozen:
            getattr(self.model, name).eval()  # its batch norm statistics stay as they are too
        self.sampler.epoch = self.epoch
        self.sampler.mosaic = self.progress() < 1 - self.recipe.plain_share
        total, steps = torch.zeros(4, device=self.device), 0
        begun = time.monotonic()
        for batch in self.batches():
            asked = self.should_stop is not None and self.should_stop()
            stopped, progress = distributed.agree(asked, self.schedule.progress())
            if stopped:
                return None
            if steps and self.recipe.time_budget_s is not None and progress >= 1:
                break
            total += self.train_step(batch, progress)
            steps += 1
            if self.on_step is not None and self.writes:
                self.on_step(self.epoch + 1, steps, len(self.sampler))
            # Reading the loss waits for the GPU, so there it is read now and then only.
            if self.device.type == "cpu" or steps % 20 == 0:
                self.check_finite(total)
        total = distributed.total(total) / distributed.size()
        self.check_finite(total)
        self.train_seconds += time.monotonic() - begun
        return total / steps

    def batches(self) -> Iterator[Batch]:
        try:
            yield from self.loader
        except DataError as error:  # of an image; from a worker process the message is a whole traceback
            reason = str(error).strip().splitlines()[-1].partition("DataError: ")
            raise DataError(reason[2] or reason[0]) from error

    def train_step(self, batch: Batch, progress: float) -> Tensor:
        """Forward, backward and update on one batch; returns its losses [4], detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate(progress)
        try:
            images, targets = self.network.prepare(batch.images), batch.targets.to(self.device)
            output = self.network(images)
            losses = self.loss(output, targets)
            total = losses.total
            if self.distiller is not None:
                total = total + self.recipe.distillation * self.distiller(output, images, targets)
            self.scaler.scale(total).backward()
            self.scaler.unscale_(self.optimizer)
            if self.recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        except torch.OutOfMemoryError as error:
            raise YolonasError(
                f"the memory of {self.device} does not hold a batch of {self.recipe.batch} images of "
                f"{self.recipe.image_size} px: lower the batch or the image size"
            ) from error
        self.ema.update()
        self.schedule.step += 1
        return torch.stack([total.detach(), losses.classification, losses.iou, losses.dfl])

    def check_finite(self, losses: Tensor) -> None:
        if not bool(losses.isfinite().all()):
            raise YolonasError(
                f"the loss is no longer a finite number (epoch {self.epoch + 1}, step {self.schedule.step}): lower the "
                f"learning rate, which is {self.recipe.lr:g}; the checkpoints of earlier epochs are unharmed"
            )

    def evaluate_and_save(self) -> Metrics | None:
        """Measure the averaged weights and write them as `last`, and as `best` where they are."""
        begun = time.monotonic()
        metrics = self.validation.measure(self.ema.model)
        self.schedule.closing_seconds = time.monotonic() - begun + CLOSING_S
        self.save(self.last, self.ema.model, metrics)
        if metrics is not None and self.recipe.average_best > 1 and self.writes:
            values = {**self.values(), self.epoch: getattr(metrics, self.recipe.select_by)}
            self.snapshots.add(self.epoch, values, self.ema.model.state_dict())
        self.keep_if_best(self.ema.model, metrics)
        return metrics

    def look(self) -> Metrics | None:
        """Measure the averaged weights on the watched images where that stays within its share of the time so far."""
        watched = len(self.validation.watch)
        expected = FORWARD_SHARE * (CALIBRATION_IMAGES + watched) / max(self.images_per_second(), 1e-6)
        cost = self.look_seconds + (self.last_look_seconds or expected)
        if not watched or not distributed.agree(cost <= WATCH_SHARE * self.schedule.seconds())[0]:
            return None
        begun = time.monotonic()
        metrics = self.validation.look(self.ema.model)
        self.last_look_seconds = time.monotonic() - begun
        self.look_seconds += self.last_look_seconds
        return metrics

    def keep_if_best(self, model: YoloNAS, metrics: Metrics | None, **record: Any) -> None:
        value = getattr(metrics, self.recipe.select_by) if metrics else -1.0
        if metrics is None or value > self.best_value:
            self.save(self.best, model, metrics, **record)
            self.metrics, self.best_value = metrics, value
            self.best_detections = self.validation.detections

    def average_best(self) -> None:
        """Try the mean of the best evaluated weights, and keep it where it is better than each of them."""
        epochs = self.snapshots.epochs() if self.writes else []
        if distributed.agree(len(epochs))[0] > 1:
            if self.writes:
                self.ema.model.load_state_dict(self.snapshots.mean())
            distributed.spread(self.ema.model)
            self.keep_if_best(self.ema.model, self.validation.measure(self.ema.model), averaged_epochs=epochs)
            if self.writes:
                self.save_resume()
        if self.writes:
            self.snapshots.clear()

    def save(self, path: Path, model: YoloNAS, metrics: Metrics | None, **more: Any) -> None:
        if not self.writes:
            return
        conf = metrics.threshold if metrics else Checkpoint.conf
        record = {**self.record(metrics), **more}
        checkpoint.save(Checkpoint(model, conf=conf, license=self.license, record=record), path)

    def record(self, metrics: Metrics | None) -> dict[str, Any]:
        """How a checkpoint was made."""
        evaluated = [report for report in self.history if report.ap is not None]
        return {
            "recipe": self.recipe.to_dict(),
            "start": self.origin,
            "taught": self.teacher_weights is not None,
            "train_images": len(self.train),
            "train_objects": self.train.objects,
            "val_images": len(self.val),
            "val_objects": self.val.objects,
            "epoch": self.epoch,
            "seconds": round(self.schedule.seconds(), 1),
            "metrics": metrics.to_dict() if metrics else None,
            "history": [{"epoch": r.epoch, "loss": r.loss, "ap": r.ap, "ap50": r.ap50} for r in evaluated],
            "device": str(self.device),
            "precision": str(self.network.dtype or torch.float32).removeprefix("torch."),
            "processes": distributed.size(),
            "torch": str(torch.__version__),
        }

    def write_report(self, *, over: bool = True) -> None:
        """The page for people."""
        if not self.writes:
            return
        if over and self.val.images and self.best_detections is None:  # the best is of before a resume
            self.best_detections = predict_dataset(Detector(self.best, self.device, runtime="torch"), self.val)
        shown = ", ".join(self.train.names[:4]) + (", ..." if len(self.train.names) > 4 else "")
        write_html(
            self.out_dir / "report.html",
            title=f"YOLO-NAS {self.model.variant}: {shown}",
            data=self.val if over else None,
            detections=self.best_detections or [],
            history=self.history,
            record={**self.record(self.metrics), "reasons": self.recipe.reasons},
            dropped=self.train.dropped,
        )

    def report(self, losses: Tensor, metrics: Metrics | None) -> EpochReport:
        total, classification, iou, dfl = losses.tolist()
        planned = round(self.epoch / min(max(self.schedule.progress(), 1e-6), 1))
        return EpochReport(
            epoch=self.epoch,
            epochs=max(self.epoch, min(self.recipe.epochs, planned)),
            step=self.schedule.step,
            lr=self.optimizer.param_groups[0]["lr"],
            loss=total,
            classification=classification,
            iou=iou,
            dfl=dfl,
            ap=metrics.ap if metrics else None,
            ap50=metrics.ap50 if metrics else None,
            seconds=self.schedule.seconds(),
            seconds_left=self.schedule.seconds_left(),
            images_per_second=self.images_per_second(),
        )

    def images_per_second(self) -> float:
        return self.schedule.step * self.recipe.batch / self.train_seconds if self.train_seconds else 0.0

    def save_resume(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "ema_steps": self.ema.steps,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.schedule.step,
            "seconds": self.schedule.seconds(),
            "closing_seconds": self.schedule.closing_seconds,
            "train_seconds": self.train_seconds,
            "look_seconds": self.look_seconds,
            "best_value": self.best_value,
            "metrics": self.metrics.to_dict() if self.metrics else None,
            "history": [asdict(report) for report in self.history],
            "recipe": self.recipe.to_dict(),
            "data": self.fingerprint(),
        }
        write_resume(self.out_dir / RESUME_FILE, state)

    def restore(self) -> None:
        """Take up the state in `out_dir`, where there is one."""
        path = self.out_dir / RESUME_FILE
        if not path.exists():
            return
        state = read_resume(path)
        check_resume(path, state, self.recipe.to_dict(), self.fingerprint())
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.steps = state["ema_steps"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch = state["epoch"]
        self.schedule.step = state["step"]
        self.schedule.seconds_before = state["seconds"]
        self.schedule.closing_seconds = state["closing_seconds"]
        self.train_seconds = state["train_seconds"]
        self.look_seconds = state.get("look_seconds", 0.0)  # older files have none
        self.best_value = state["best_value"]
        self.metrics = Metrics(**state["metrics"]) if state["metrics"] else None
        self.history = [EpochReport(**report) for report in state["history"]]

    def fingerprint(self) -> list[Any]:
        """What must be the same for a run to go on."""
        parts = [[len(data), data.objects, list(data.names)] for data in (self.train, self.val)]
        return [self.model.variant, self.first_weights, self.teacher_weights, *parts]

    def result(self, *, stopped: bool) -> TrainResult:
        if self.epoch < self.recipe.evaluate_every and stopped:  # nothing saved yet: leave the weights as they are
            self.save(self.last, self.ema.model, None)
            self.save(self.best, self.ema.model, None)
        seconds = self.schedule.seconds()
        return TrainResult(
            self.best, self.last, self.metrics, self.epoch, seconds, self.images_per_second(), stopped=stopped
        )
