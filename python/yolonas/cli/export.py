"""`yolonas export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from yolonas.cli import options
from yolonas.errors import CheckpointError

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}


@click.command(short_help="Write a checkpoint for ONNX Runtime, OpenVINO or torch.export.")
@options.weights
@click.option(
    "--format",
    type=click.Choice(list(SUFFIXES)),
    help="onnx (.onnx), openvino (.xml and .bin) or pt2 (.pt2, of torch.export).  [default: that of --out, else onnx]",
)
@click.option("--nms", is_flag=True, help="Put decoding and NMS into the file, with --conf, --iou and --max-det.")
@click.option(
    "--output-format",
    type=click.Choice(["flat", "batch"]),
    help="With --nms: batch gives num_predictions, pred_boxes, pred_scores, pred_classes, padded with -1; flat gives "
    "rows of image, x1, y1, x2, y2, score, class.  [default: batch]",
)
@click.option("--half", is_flag=True, help="float16 weights: half the size.")
@click.option("--int8", is_flag=True, help="Quantize with NNCF, calibrated on the images of --data.")
@click.option("--dynamic", is_flag=True, help="Take any batch, height and width, in multiples of 32.")
@options.imgsz
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images in one call.")
@click.option(
    "--input",
    "input_type",
    type=click.Choice(["uint8", "float"]),
    default="uint8",
    show_default=True,
    help="What the file takes: pixels 0..255, or float 0..1.",
)
@options.conf(None)
@options.iou(None)
@options.max_det
@click.option("--source", multiple=True, help="Images, a folder or a pattern to compare file and model on.")
@click.option("--data", type=click.Path(path_type=Path), help="Data set: images for --int8, and to compare on.")
@click.option("--out", "--file", type=click.Path(path_type=Path), help="File to write.  [default: WEIGHTS' name]")
def export(
    weights: str,
    format: str | None,
    nms: bool,
    output_format: str | None,
    half: bool,
    int8: bool,
    dynamic: bool,
    imgsz: tuple[int, int] | None,
    batch: int,
    input_type: str,
    conf: float | None,
    iou: float | None,
    max_det: int,
    source: tuple[str, ...],
    data: Path | None,
    out: Path | None,
) -> None:
    """Write a checkpoint for ONNX Runtime, OpenVINO or torch.export, and check the file against the model.

    The file takes `images` [B, 3, H, W] and gives the six raw head maps, which every runtime of yolonas decodes, or
    with --nms detections in pixels of the canvas. Class names, preprocessing, thresholds and the licence travel inside.
    After writing, file and model run on the same images; a file that differs is not kept.
    """
    from yolonas import checkpoint as checkpoints
    from yolonas.export import export as write
    from yolonas.weights import resolve

    if half and int8:
        raise click.UsageError("--half and --int8 exclude each other: choose one")
    if output_format is not None and not nms:
        raise click.UsageError("--output-format is that of the detections: add --nms")
    if int8 and data is None:
        raise click.UsageError("--int8 is calibrated on images: name a data set with --data")
    if out is None:
        out = Path(Path(weights).stem + SUFFIXES[format or "onnx"])
    path = resolve(weights)
    if path.resolve() == out.resolve():
        raise CheckpointError(f"{out} would be written over the weights that it comes from: give another --out")
    checkpoint = checkpoints.load(path)
    arguments: dict[str, Any] = {"images": list(source) or None, "data": data}
    try:
        exported = write(
            checkpoint,
            out,
            format,  # type: ignore[arg-type]
            nms=nms,
            output_format=output_format or "batch",  # type: ignore[arg-type]
            half=half,
            int8=int8,
            dynamic=dynamic,
            imgsz=imgsz,
            batch=batch,
            input=input_type,  # type: ignore[arg-type]
            conf=conf,
            iou=iou,
            max_det=max_det,
            **arguments,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    manifest = exported.manifest
    sides = "any, any" if manifest.image_size is None else "{}, {}".format(*manifest.image_size)
    outputs = "the six raw maps" if manifest.output == "raw" else f"detections ({manifest.output})"
    opset = f", opset {exported.opset}" if exported.opset else ""
    click.echo(f"Wrote {out}: {exported.size / 1e6:.1f} MB, {manifest.precision}{opset}, in {exported.seconds:.1f} s")
    click.echo(f"takes images [{manifest.batch or 'any'}, 3, {sides}] {manifest.input}; gives {outputs}")
    click.echo(f"compared with the model: {exported.parity}")
    if checkpoint.license is not None:
        click.echo(f"licence of the weights, which binds this file too: {checkpoint.license}")
