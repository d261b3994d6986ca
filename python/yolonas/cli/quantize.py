"""`yolonas quantize`."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from yolonas.checkpoint import Checkpoint
    from yolonas.data.labelled import LabelledImages
    from yolonas.quantization import Quantizer
    from yolonas.quantization_report import Row
    from yolonas.quantization_search import Measured

REPORTS = (".html", ".json", ".md")


@click.command(short_help="Make a checkpoint INT8, and measure what that costs and gains.")
@options.weights
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="COCO or Label Studio json, data.yaml, or a folder: its training images calibrate.",
)
@click.option("--val", type=click.Path(path_type=Path), help="Validation images.  [default: the part val of --data]")
@click.option(
    "--preset",
    type=click.Choice(["full", "heads-float"]),
    default="full",
    show_default=True,
    help="What is quantized: every layer, or all but the last layers of the heads.",
)
@click.option(
    "--max-drop",
    "--max_drop",
    type=click.FloatRange(min=0, min_open=True),
    metavar="POINTS",
    help="Leave in float what costs most, until AP (0 to 100) drops by no more on the validation images.",
)
@click.option(
    "--qat", is_flag=True, help="Train on under quantization first: a tenth of the epochs, at 1 % of the rate."
)
@click.option("--epochs", type=click.IntRange(min=1), help="Of --qat.  [default: a tenth of the training's]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Time for --qat.")
@click.option(
    "--calibration",
    type=click.IntRange(min=1),
    default=300,
    show_default=True,
    help="Images to calibrate with, at most.",
)
@click.option("--tensorrt", is_flag=True, help="An ONNX file for TensorRT, which takes no uint8; slow elsewhere.")
@options.imgsz
@click.option("--batch", type=click.IntRange(min=1), help="Images in a step of --qat.  [default: half the training's]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The same seed, the same file.")
@options.device
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="File to write: .onnx for every runtime, .xml for OpenVINO alone.  [default: WEIGHTS_int8.onnx here]",
)
@click.option("--report", type=click.Path(path_type=Path), help="Write the figures to this .html, .json or .md file.")
def quantize(
    weights: str,
    data: Path,
    val: Path | None,
    preset: str,
    max_drop: float | None,
    qat: bool,
    epochs: int | None,
    minutes: float | None,
    calibration: int,
    tensorrt: bool,
    imgsz: tuple[int, int] | None,
    batch: int | None,
    seed: int,
    device: Any,
    out: Path | None,
    report: Path | None,
) -> None:
    """Quantize a checkpoint to INT8 by NNCF, and measure AP, latency and size against the float network.

    The AP of each form comes with the 95 % bootstrap interval of its difference to float; --max-drop asks that the
    lower end of that interval be no more than so many points below. The drawing in the .html report shows what
    quantizing each layer alone changes.
    """
    from yolonas.extras import require
    from yolonas.quantization import check_suffix

    out = out or Path(f"{Path(weights).stem}_int8.onnx")
    for needed in ("openvino", "nncf"):
        require(needed, "quantize", "yolonas quantize")
    if tensorrt:
        require("onnxruntime", "onnx", "measuring a file for TensorRT")
    for name, value in (("--epochs", epochs), ("--minutes", minutes), ("--batch", batch)):
        if value is not None and not qat:
            raise click.UsageError(f"{name} is an option of --qat: give both or neither")
    try:
        check_suffix(out)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if tensorrt and out.suffix.lower() != ".onnx":
        raise click.UsageError(f"--tensorrt makes an ONNX file: let --out end in .onnx, not {out.suffix or out.name}")
    if report is not None and report.suffix.lower() not in REPORTS:
        raise click.UsageError(f"--report must end in {', '.join(REPORTS)}, not {report.name}")
    if not out.parent.is_dir():
        raise DataError(f"{out} cannot be written, as the folder {out.parent} does not exist: make it first")
    checkpoint = _checkpoint(weights, imgsz)
    training, validation = read_parts(data, val, seed, labels_for=needs_labels(max_drop, qat, report))
    run = _Run(checkpoint, training, validation, out, preset, calibration, tensorrt)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            found = run.forms(
                Path(folder), max_drop, qat, {"epochs": epochs, "minutes": minutes, "batch": batch}, seed, device
            )
            rows = run.rows(found)
            if rows:
                from yolonas import quantization_report

                click.echo(quantization_report.markdown(rows))
                if report is not None:
                    sensitivity = run.sensitivity()
                    title = f"{Path(weights).name} in INT8"
                    quantization_report.write(report, rows, sensitivity, title=title, notes=run.notes())
    except OSError as error:
        raise DataError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    for note in run.notes():
        click.echo(note)
    if report is not None and rows:
        click.echo(f"Wrote {report}")
    click.echo(f"Wrote {out}")


class _Run:
    """What one call of the command makes, kept so that nothing is made twice."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        training: LabelledImages,
        validation: LabelledImages,
        out: Path,
        preset: str,
        calibration: int,
        tensorrt: bool,
    ) -> None:
        self.checkpoint, self.training, self.validation = checkpoint, training, validation
        self.out, self.preset, self.calibration, self.tensorrt = out, preset, calibration, tensorrt
        self.quantizer = self._quantizer(checkpoint)
        self._sensitivity: dict[str, float] = {}
        self._remarks: list[str] = []

    def _quantizer(self, checkpoint: Checkpoint) -> Quantizer:
        from yolonas.quantization import Quantizer

        paths = [image.path for image in self.training.images]
        return Quantizer(checkpoint, paths, count=self.calibration, progress=True)

    def forms(
        self, folder: Path, max_drop: float | None, qat: bool, changes: dict[str, Any], seed: int, device: Any
    ) -> list[Measured]:
        """Float, quantized, trained on and selective, as far as they are asked for; what is chosen is put at `out`."""
        from yolonas.quantization_search import Judge, select

        if not self.validation.objects:
            self.quantizer.write(self.out, preset=self.preset, tensorrt=self.tensorrt)
            return []
        judge = Judge(self.validation, "onnxruntime" if self.tensorrt else "openvino", progress=True)
        suffix = self.out.suffix
        base = folder / f"float{suffix}"
        self.quantizer.write_float(base)
        found = [judge.measure("float", base)]

        def add(name: str) -> Measured:
            path = folder / f"{len(found)}{suffix}"
            self.quantizer.write(path, preset=self.preset, tensorrt=self.tensorrt)
            found.append(judge.measure(name, path))
            return found[-1]

        best = add(f"INT8, {self.preset}")
        if qat:
            from yolonas.training.qat import fine_tune

            tuned = fine_tune(
                self.checkpoint,
                self.training,
                self.validation,
                canvases=self.quantizer.canvases,
                float_layers=best.float_layers,
                seed=seed,
                device=device,
                progress=True,
                **changes,
            )
            untrained = self.checkpoint, self.quantizer
            self.checkpoint, self.quantizer = tuned, self._quantizer(tuned)
            trained = add("INT8, trained on")
            if trained.metrics.ap >= best.metrics.ap:
                best = trained
            else:
                self.checkpoint, self.quantizer = untrained
                self._remarks.append("Training on made it no better, so the file is the one without.")
        if max_drop is not None and not best.holds(max_drop):
            best = select(
                self.quantizer,
                judge,
                folder / f"selective{suffix}",
                self.sensitivity(),
                max_drop=max_drop,
                preset=self.preset,
                tensorrt=self.tensorrt,
                first=best,
                on_try=_tell,
            )
            best = dataclasses.replace(best, name="INT8, selective")
            found.append(best)
        if qat or best.name == "INT8, selective":
            self._remarks.append("The file was chosen by these images, so its figures are optimistic: judge on others.")
        _place(best.path, folder / self.out.name, self.out)
        return found

    def rows(self, found: Sequence[Measured]) -> list[Row]:
        from yolonas.quantization_report import rows

        return rows(found, self.quantizer.canvases[0]) if found else []

    def sensitivity(self) -> dict[str, float]:
        """Of each layer of the checkpoint that is quantized last; computed once."""
        from tqdm import tqdm

        from yolonas.fake_quantization import SENSITIVITY_IMAGES, sensitivity

        if not self._sensitivity:
            with tqdm(total=len(self.quantizer.layers), desc="sensitivity", unit="layer", leave=False) as bar:
                canvases = self.quantizer.canvases
                self._sensitivity = sensitivity(
                    self.checkpoint.model.fused(),
                    canvases[:: max(len(canvases) // SENSITIVITY_IMAGES, 1)][:SENSITIVITY_IMAGES],
                    on_layer=bar.update,
                )
        return self._sensitivity

    def notes(self) -> list[str]:
        """What the figures mean, and what to do with the file."""
        from yolonas.bootstrap import RESAMPLES

        notes = [f"Calibrated on {len(self.quantizer.canvases)} images."]
        if self.validation.objects:
            notes.append(
                f"AP on {len(self.validation)} validation images; intervals from {RESAMPLES} paired resamples. "
                "Latency: the network alone, one image, median, all forms taking turns."
            )
        else:
            notes.append("Nothing was measured, as there are no labelled validation images: give them with --val.")
        notes += self._remarks
        if self.tensorrt:
            height, width = self.checkpoint.model.preprocessing.image_size
            shape = f"images:1x3x{height}x{width}"
            notes.append(
                f"TensorRT, not run here: trtexec --onnx={self.out} --saveEngine={self.out.stem}.engine "
                f"--stronglyTyped --minShapes={shape} --optShapes={shape} --maxShapes={shape}"
            )
        if self.checkpoint.license:
            notes.append(f"Licence of the weights, and so of the file: {self.checkpoint.license}")
        return notes


def needs_labels(max_drop: float | None, qat: bool, report: Path | None) -> str:
    """The option that cannot do without labelled validation images; empty for none."""
    return "--max-drop" if max_drop else "--qat" if qat else "--report" if report else ""


def read_parts(
    data: Path, val: Path | None, seed: int, *, labels_for: str = ""
) -> tuple[LabelledImages, LabelledImages]:
    """Calibration and validation images; the latter from `val`, the part val, or every fifth image.

    Raises DataError where there is no image, or, for the option `labels_for`, no object in the validation images.
    """
    from yolonas.cli.train import _split
    from yolonas.data.check import usable
    from yolonas.data.readers import read_dataset, splits

    parts = splits(data)
    if parts and "train" not in parts:
        raise DataError(f"{data} has the parts {', '.join(parts)} but no part train to calibrate on")
    training = read_dataset(data, "train" if parts else None)
    if not training.images:
        raise DataError(f"{data} has no image to calibrate on")
    training = usable(training, progress=True)
    held_out = None
    if val is not None:
        held_out = read_dataset(val, "val" if "val" in splits(val) else None)
    elif "val" in parts:
        held_out = read_dataset(data, "val")
    if held_out is None:
        training, held_out = _split(training, seed)
    if held_out.images:
        held_out = usable(held_out, most_pixels=math.inf, progress=True)
    if labels_for and not held_out.objects:
        raise DataError(f"{labels_for} needs labelled validation images, and {val or data} has none: give --val")
    return training, held_out


def _checkpoint(weights: str, imgsz: tuple[int, int] | None) -> Checkpoint:
    from yolonas import checkpoint
    from yolonas.exported import SUFFIXES
    from yolonas.weights import resolve

    if Path(weights).suffix.lower() in SUFFIXES:
        raise CheckpointError(f"{weights} is an exported network: quantize the checkpoint that it was exported from")
    loaded = checkpoint.load(resolve(weights))
    if imgsz is not None:
        loaded.model.preprocessing = loaded.model.preprocessing.on_canvas(imgsz)
    return loaded


def _place(path: Path, copy: Path, out: Path) -> None:
    """Put a copy of an exported network at `out`, with the weights that an .xml has beside it, those first.

    It is made as `copy`, on the same file system, and renamed.
    """
    import shutil

    for suffix in (".bin", out.suffix) if out.suffix.lower() == ".xml" else (out.suffix,):
        Path(shutil.copy(path.with_suffix(suffix), copy.with_suffix(suffix))).replace(out.with_suffix(suffix))


def _tell(tried: Measured) -> None:
    difference = tried.difference
    if difference is not None:
        shown = f"AP {100 * difference.value:+.2f} ({100 * difference.low:+.2f} to {100 * difference.high:+.2f})"
        click.echo(f"{tried.name}: {shown}", err=True)
