"""`yolonas benchmark`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import DataError

if TYPE_CHECKING:
    from yolonas.data.labelled import LabelledImages
    from yolonas.inference.sources import Image

RUNTIMES = ("torch", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
IN_MEMORY = 16  # images that are timed, in turn


def _choices(known: Sequence[str]) -> Any:
    def parse(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
        if value is None:
            return None
        chosen = [name.strip() for name in value.split(",")]
        for name in chosen:
            if name not in known:
                raise click.BadParameter(f"{name!r} is not one of {', '.join(known)}")
        return list(dict.fromkeys(chosen))

    return parse


def _batches(ctx: click.Context, param: click.Parameter, value: str) -> list[int]:
    try:
        sizes = [int(size) for size in value.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise click.BadParameter(f"{value!r} is no list of batch sizes: write 1,8")
    return list(dict.fromkeys(sizes))


@click.command(short_help="Measure speed and accuracy in every runtime and precision.")
@click.option(
    "--weights",
    "--model",
    required=True,
    multiple=True,
    help="Checkpoint, exported file or name of weights; may be repeated. With --coco the published ones' folder.",
)
@click.option(
    "--runtime",
    metavar="NAMES",
    callback=_choices(RUNTIMES),
    help="By commas: torch, onnxruntime, openvino.  [default: all; with --coco the quickest installed]",
)
@click.option(
    "--precision",
    metavar="NAMES",
    callback=_choices(PRECISIONS),
    help="By commas: fp32, bf16, fp16, int8.  [default: fp32,bf16,int8, on a GPU fp32,fp16; with --coco fp32,int8]",
)
@click.option("--batch", default="1,8", show_default=True, callback=_batches, help="Batch sizes, by commas.")
@options.imgsz
@click.option("--data", type=click.Path(path_type=Path), help="Labelled images: AP, and INT8 is calibrated on them.")
@click.option("--split", help="Part of --data that AP is measured on.  [default: val, where it has parts]")
@click.option(
    "--source", help="Images to time, a file, folder or pattern.  [default: those of --data, else drawn ones]"
)
@click.option(
    "--coco",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="COCO's folder (annotations/, val2017/): the published table of S, M, L, float and INT8.",
)
@options.device
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every runtime.  [default: all cores]")
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    help="Rounds; at least 5 where they take more than a minute.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="benchmark",
    show_default=True,
    help="Folder of benchmark.md, .json and .svg.",
)
def benchmark(
    weights: tuple[str, ...],
    runtime: list[str] | None,
    precision: list[str] | None,
    batch: list[int],
    imgsz: tuple[int, int] | None,
    data: Path | None,
    split: str | None,
    source: str | None,
    coco: Path | None,
    device: Any,
    threads: int | None,
    repeats: int,
    out: Path,
) -> None:
    """Measure checkpoints on this machine in every runtime, precision and batch size that it has.

    Letterbox, network and post-processing are timed apart and together, contenders in turn. What is not installed or
    not possible is listed with its reason. With --data the picture shows AP against latency.

    `yolonas benchmark --coco DIR --weights DIR` measures the published table again; a run that was cut goes on.
    """
    from yolonas.inference.device import resolve_device

    device = str(resolve_device(device))
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or 0) or os.cpu_count() or 1
    _make_folder(out)
    if coco is not None:
        _published_table(weights, coco, runtime, precision, imgsz, device, threads, repeats, out)
        return
    from yolonas.benchmark import benchmark as run
    from yolonas.benchmark_report import markdown, picture
    from yolonas.inference.sources import read_image
    from yolonas.weights import resolve

    files = [resolve(name) for name in dict.fromkeys(weights)]
    labelled, calibration = _labelled(data, split)
    paths = _paths(source) or ([image.path for image in labelled.images] if labelled else [])
    images = [read_image(path) for path in paths[:IN_MEMORY]] or _drawn()
    default = ["fp32", "fp16"] if device.startswith("cuda") else ["fp32", "bf16", "int8"]
    rows, left = run(
        files,
        images=images,
        folder=out,
        runtimes=runtime or RUNTIMES,
        precisions=precision or default,
        batches=batch,
        data=labelled,
        calibration=calibration or paths,
        device=device,
        imgsz=imgsz,
        threads=threads,
        repeats=repeats,
        say=lambda line: click.echo(line, err=True),
    )
    notes = [f"AP on {len(labelled)} images of {data}."] if labelled else []
    judged = {image.path for image in labelled.images} if labelled else set()
    if "int8" in {row.precision for row in rows} and not judged.isdisjoint(calibration or paths):
        notes.append("INT8 was calibrated on images that its AP is of.")
    notes.append(f"Timed on {len(images)} images of {source or data}." if paths else "Timed on drawn images.")
    text = markdown(rows, left, notes)
    click.echo(text)
    _write(out / "benchmark.md", text)
    document = {"rows": [row.to_dict() for row in rows], "not_measured": [entry._asdict() for entry in left]}
    _write(out / "benchmark.json", json.dumps(document, indent=1))
    if any(row.ap is not None for row in rows):
        _write(out / "benchmark.svg", picture(rows, f"AP on {data} against latency"))
    if not rows:
        raise DataError("nothing could be measured; the reasons are above")


def _published_table(
    weights: tuple[str, ...],
    coco: Path,
    runtimes: list[str] | None,
    precisions: list[str] | None,
    imgsz: tuple[int, int] | None,
    device: str,
    threads: int,
    repeats: int,
    out: Path,
) -> None:
    from yolonas.coco_benchmark import coco_markdown, measure_coco, quickest_runtime

    if len(weights) != 1 or len(runtimes or [""]) != 1:
        raise click.UsageError("with --coco give one --weights, the folder of S, M and L, and at most one --runtime")
    if unknown := set(precisions or []) - {"fp32", "int8"}:
        raise click.UsageError(f"the published table has fp32 and int8, not {', '.join(sorted(unknown))}")
    folder = Path(weights[0])
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: with --coco give the folder of yolo_nas_s_coco.pth and so on")
    rows = measure_coco(
        coco,
        folder,
        out,
        runtime=runtimes[0] if runtimes else quickest_runtime(device),
        precisions=precisions or ("fp32", "int8"),
        device=device,
        imgsz=imgsz,
        threads=threads,
        repeats=repeats,
        say=lambda line: click.echo(line, err=True),
    )
    text = coco_markdown(rows, f"yolonas benchmark --coco {coco} --weights {folder}")
    click.echo(text)
    _write(out / "coco.md", text)
    _write(out / "coco.json", json.dumps([row.to_dict() for row in rows], indent=1))


def _labelled(path: Path | None, split: str | None) -> tuple[LabelledImages | None, list[Path]]:
    """The labelled images for AP, and those for calibration: of the part train where there is one, else the same."""
    from yolonas.data.readers import read_dataset, splits

    if path is None:
        return None, []
    parts = splits(path)
    data = read_dataset(path, split or ("val" if "val" in parts else None))
    if not data.objects:
        raise DataError(f"{path} has no object in its {len(data)} images, so there is no AP to measure")
    other = read_dataset(path, "train") if "train" in parts else data
    return data, [image.path for image in other.images]


def _paths(source: str | None) -> list[Path]:
    from yolonas.inference.sources import iter_sources

    return [item for item in iter_sources(source) if isinstance(item, Path)] if source is not None else []


def _drawn() -> list[Image]:
    import numpy as np

    from yolonas.data.samples import draw

    return [draw(np.random.default_rng([0, index]), 480, 640)[0] for index in range(4)]


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    click.echo(f"Wrote {path}", err=True)
