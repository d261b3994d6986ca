"""`yolonas val`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import DataError

if TYPE_CHECKING:
    from yolonas.data.labelled import LabelledImages
    from yolonas.evaluation import Metrics


@click.command(short_help="Measure a checkpoint on labelled images.")
@options.weights
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="COCO or Label Studio json, data.yaml, or a folder."
)
@click.option("--split", help="Part of the data set.  [default: val, where it has parts]")
@click.option("--images-dir", type=click.Path(path_type=Path), help="Where the images of a COCO json file are.")
@options.conf(0.01)
@options.iou(None)
@options.imgsz
@options.max_det
@options.device
@options.runtime
@options.precision
@options.batch
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report, with pictures, to this file.")
def val(
    weights: str,
    data: Path,
    split: str | None,
    images_dir: Path | None,
    conf: float,
    iou: float | None,
    imgsz: tuple[int, int] | None,
    max_det: int,
    device: Any,
    runtime: str,
    precision: str,
    batch: int,
    json_path: Path | None,
    report: Path | None,
) -> None:
    """Measure a checkpoint on labelled images with pycocotools: COCO AP, AP of each class, and the best F1.

    Classes of the model and of the data meet by name; a class that the model lacks counts as missed.
    """
    from yolonas.data.readers import read_dataset, splits
    from yolonas.evaluation import coco_ap, predict_dataset
    from yolonas.inference.detector import Detector

    if split is None and "val" in splits(data):
        split = "val"
    images = read_dataset(data, split, images_dir=images_dir)
    _report_dropped(images)
    if not images.objects:
        raise DataError(f"{data} has no object in its {len(images)} images, so there is nothing to measure")
    detector = Detector(weights, device, runtime, precision)
    iou = detector.manifest.iou if iou is None else iou
    begun = time.perf_counter()
    detections = predict_dataset(
        detector, images, conf=conf, iou=iou, max_det=max_det, batch=batch, imgsz=imgsz, progress=True
    )
    seconds = time.perf_counter() - begun
    metrics = coco_ap(images, detections)
    metrics.seconds = seconds
    if detector.choice.milliseconds:
        click.echo(detector.choice.report())
    click.echo(table(images, metrics))
    if json_path is not None:
        try:
            json_path.write_text(json.dumps(metrics.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{json_path} cannot be written: {error.strerror or error}") from error
        click.echo(f"Wrote {json_path}")
    if report is not None:
        from yolonas.training.html_report import write_html

        try:
            write_html(
                report,
                title=f"{Path(weights).name} on {data.name}{f', {split}' if split else ''}",
                data=images,
                detections=detections,
                record=detector.manifest.record,
                threshold=detector.manifest.conf,
            )
        except OSError as error:
            raise DataError(f"{report} cannot be written: {error.strerror or error}") from error
        click.echo(f"Wrote {report}")


def table(data: LabelledImages, metrics: Metrics) -> str:
    """The figures as text, best class first."""
    counts = [0] * len(data.names)
    for image in data.images:
        for label in image.labels[~image.crowd].tolist():
            counts[label] += 1
    width = max(len("class"), *(len(name) for name in data.names))
    lines = [f"{'class':{width}}  objects     AP"]
    for name, ap in sorted(metrics.per_class.items(), key=lambda item: -item[1]):
        lines.append(f"{name:{width}}  {counts[data.names.index(name)]:7d}  {ap:.3f}")
    speed = f", {metrics.images / metrics.seconds:.1f} images/s" if metrics.seconds else ""
    lines += [
        f"{metrics.images} images, {metrics.objects} objects{speed}",
        f"AP {metrics.ap:.4f}   AP50 {metrics.ap50:.4f}   AP75 {metrics.ap75:.4f}   AR {metrics.ar:.4f}",
        f"best F1 {metrics.f1:.3f} at score {metrics.threshold:.3f}: "
        f"precision {metrics.precision:.3f}, recall {metrics.recall:.3f}",
    ]
    return "\n".join(lines)


def _report_dropped(data: LabelledImages, most: int = 10) -> None:
    if not data.dropped:
        return
    click.echo(f"{len(data.dropped)} entries of the data set were left out:", err=True)
    for line in data.dropped[:most]:
        click.echo(f"  {line}", err=True)
    if len(data.dropped) > most:
        click.echo(f"  and {len(data.dropped) - most} more", err=True)
