"""`yolonas predict`."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import DataError

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections


@click.command(short_help="Find objects in images.")
@click.option("--source", required=True, multiple=True, help="Image file, folder or glob pattern; may be repeated.")
@options.weights
@options.conf(None)
@options.iou(None)
@options.imgsz
@options.max_det
@options.device
@options.runtime
@options.precision
@options.batch
@click.option(
    "--out", type=click.Path(path_type=Path), default="predictions", show_default=True, help="Folder to write."
)
@click.option(
    "--save-json",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Write the detections as JSON.  [OUT/predictions.json]",
)
@click.option(
    "--save-coco", metavar="[FILE]", is_flag=False, flag_value="", help="Write them as COCO json.  [OUT/coco.json]"
)
@click.option("--no-images", is_flag=True, help="Do not write pictures.")
def predict(
    source: tuple[str, ...],
    weights: str,
    conf: float | None,
    iou: float | None,
    imgsz: tuple[int, int] | None,
    max_det: int,
    device: Any,
    runtime: str,
    precision: str,
    batch: int,
    out: Path,
    save_json: str | None,
    save_coco: str | None,
    no_images: bool,
) -> None:
    """Find objects in images and write pictures with the boxes drawn, JSON and COCO json.

    Pictures keep their names, and their folders below the common one. Images that cannot be read are listed at the end;
    the exit code is 1 only if none could be read.
    """
    # Before OpenCV is imported: a damaged image gets its line at the end, and must not print into the progress bar.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    from tqdm import tqdm

    from yolonas.inference.detector import Detector
    from yolonas.inference.sources import iter_sources

    paths = list(dict.fromkeys(item for item in iter_sources(list(source)) if isinstance(item, Path)))
    pictures = dict(zip(map(str, paths), picture_names(paths), strict=True))
    detector = Detector(weights, device, runtime, precision)
    _make_folder(out)
    unreadable: list[DataError] = []
    found: list[Detections] = []
    start = time.perf_counter()
    with tqdm(total=len(paths), unit="image", disable=None) as progress:

        def report(error: DataError) -> None:
            unreadable.append(error)
            progress.update()

        for detections in detector.stream(paths, conf, iou, max_det, batch, imgsz, on_error=report):
            if not no_images:
                picture = out / pictures[str(detections.path)]
                _make_folder(picture.parent)
                detections.save(picture)
            detections.image = None
            found.append(detections)
            progress.update()
    seconds = time.perf_counter() - start
    if save_json is not None:
        _write_json(Path(save_json or out / "predictions.json"), [d.to_dict() for d in found])
    if save_coco is not None:
        _write_json(Path(save_coco or out / "coco.json"), coco_json(found, detector.names))
    if unreadable:
        click.echo(f"{len(unreadable)} of {len(paths)} images could not be read:", err=True)
        for error in unreadable:
            click.echo(f"  {error}", err=True)
    if not found:
        raise DataError("no image could be read")
    counts = Counter(d.name for detections in found for d in detections)
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(10))
    click.echo(
        f"{len(found)} images, {counts.total()} objects{f' ({listed})' if listed else ''}, "
        f"{len(found) / seconds:.1f} images/s"
    )
    if not no_images:
        click.echo(f"Pictures in {out}")


def picture_names(paths: Sequence[Path]) -> list[Path]:
    """Where to write each picture: its path below the folder that all share, as .jpg or .png, none of them twice."""
    if not paths:
        return []
    absolute = [Path(os.path.abspath(path)) for path in paths]  # not resolve(): links keep the names that people see
    shared = os.path.commonpath([path.parent for path in absolute])
    taken: set[str] = set()
    names = []
    for path in absolute:
        name = path.relative_to(shared)
        if name.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            name = name.with_name(f"{name.name}.jpg")
        plain, number = name, 2
        while str(name).casefold() in taken:  # on file systems that ignore case these are one file
            name = plain.with_name(f"{plain.stem}_{number}{plain.suffix}")
            number += 1
        taken.add(str(name).casefold())
        names.append(name)
    return names


def coco_json(found: Sequence[Detections], names: Sequence[str]) -> dict[str, Any]:
    """Detections as a COCO data set whose annotations carry a `score`; category ids are label + 1."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, detections in enumerate(found, start=1):
        height, width = detections.image_size
        images.append({"id": image_id, "file_name": detections.path, "width": width, "height": height})
        for d in detections:
            x1, y1, x2, y2 = (round(v, 3) for v in d.box.tolist())
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": d.label + 1,
                    "bbox": [x1, y1, round(x2 - x1, 3), round(y2 - y1, 3)],
                    "area": round((x2 - x1) * (y2 - y1), 3),
                    "iscrowd": 0,
                    "score": round(d.score, 6),
                }
            )
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def _write_json(path: Path, document: Any) -> None:
    try:
        path.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    click.echo(f"Wrote {path}")
