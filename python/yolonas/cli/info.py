"""`yolonas info`: what a checkpoint, or a variant, is made of."""

from __future__ import annotations

import json
import textwrap

import click


@click.command()
@click.argument("weights", default="s")
@click.option("--imgsz", type=int, help="Side of the square image for which operations are counted; multiple of 32.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def info(weights: str, imgsz: int | None, as_json: bool) -> None:
    """Show layers, parameters, GFLOPs, size, classes and preprocessing of WEIGHTS.

    WEIGHTS is a checkpoint file, the name of weights (yolo_nas_n_bccd), or a variant (n, s, m, l).
    """
    from dataclasses import asdict

    from yolonas import checkpoint as checkpoints
    from yolonas.model import VARIANTS, YoloNAS
    from yolonas.weights import resolve

    if imgsz is not None and (imgsz < 32 or imgsz % 32):
        raise click.BadParameter(f"{imgsz} is not a multiple of 32", param_hint="--imgsz")
    path = None
    if weights in VARIANTS:
        checkpoint = checkpoints.Checkpoint(YoloNAS(weights))
    else:
        path = resolve(weights)
        checkpoint = checkpoints.load(path)
    model = checkpoint.model
    figures = model.info(imgsz or model.preprocessing.image_size)
    if as_json:
        rest = {
            "conf": checkpoint.conf,
            "iou": checkpoint.iou,
            "license": checkpoint.license,
            "record": checkpoint.record,
        }
        click.echo(json.dumps({"file": path and str(path)} | asdict(figures) | rest))
        return
    lines = [str(figures), f"thresholds     conf {checkpoint.conf:g}, iou {checkpoint.iou:g}"]
    lines += [] if path is None else [f"file           {path}, {path.stat().st_size / 1e6:.1f} MB"]
    lines += [] if checkpoint.license is None else [f"licence        {checkpoint.license}"]
    nested = [key for key, value in checkpoint.record.items() if isinstance(value, dict | list)]
    lines += [f"record         {key}: {value}" for key, value in checkpoint.record.items() if key not in nested]
    lines += [f"               and {', '.join(nested)}: see --json"] if nested else []
    for line in "\n".join(lines).splitlines():
        click.echo("\n".join(textwrap.wrap(line, 120, subsequent_indent=" " * 15)))
