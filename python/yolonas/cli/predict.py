"""`yolonas predict`."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yolonas.cli import options
from yolonas.errors import DataError

if TYPE_CHECKING:
    from yolonas.inference.detections import Detections
    from yolonas.inference.outputs import Item, Output
    from yolonas.inference.tracker import Tracker


def _file_option(name: str, text: str) -> Any:
    """An option that may name a file, or stand alone for the default in the output folder."""
    return click.option(name, metavar="[FILE]", is_flag=False, flag_value="", help=text)


@click.command(short_help="Find objects in images and videos.")
@click.option(
    "--source",
    required=True,
    multiple=True,
    help="Image, video, folder, glob pattern, web address, rtsp:// stream, or number of a camera; may be repeated.",
)
@options.weights
@options.conf(None)
@options.iou(None)
@options.imgsz
@options.max_det
@options.device
@options.runtime
@options.precision
@options.batch
@click.option("--classes", multiple=True, help="Only these classes, by name or number: cat,dog or 0,2.")
@click.option(
    "--agnostic-nms", "--agnostic_nms", is_flag=True, help="Drop boxes that overlap a better one of any class."
)
@click.option(
    "--vid-stride",
    "--vid_stride",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Of videos, look at every so many frames.",
)
@click.option("--track", is_flag=True, help="Give objects the same number in all frames of a video.")
@click.option(
    "--out", type=click.Path(path_type=Path), default="predictions", show_default=True, help="Folder to write."
)
@_file_option("--save-json", "Write the detections as JSON.  [OUT/predictions.json]")
@_file_option("--save-jsonl", "Write them as JSON lines, each at once.  [OUT/predictions.jsonl]")
@_file_option("--save-coco", "Write them as COCO json.  [OUT/coco.json]")
@click.option("--save-txt", "--save_txt", is_flag=True, help="Write YOLO label files to OUT/labels.")
@click.option("--save-conf", "--save_conf", is_flag=True, help="With the scores in the YOLO label files.")
@click.option("--save-crop", "--save_crop", is_flag=True, help="Write what each box shows to OUT/crops/CLASS.")
@click.option(
    "--save-frames", "--save_frames", is_flag=True, help="Write the frames of videos as images to OUT/frames."
)
@click.option("--no-images", is_flag=True, help="Do not write pictures and videos with boxes.")
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
    classes: tuple[str, ...],
    agnostic_nms: bool,
    vid_stride: int,
    track: bool,
    out: Path,
    no_images: bool,
    **saving: Any,
) -> None:
    """Find objects in images and videos, and write them with the boxes drawn, as JSON, COCO json, YOLO labels.

    Pictures keep their names, and their folders below the common one. A live source goes on until it is lost or Ctrl-C
    is pressed, which finishes all files. What cannot be read is listed at the end; the exit code is 1 only if nothing
    could be read, and 130 if Ctrl-C left something out.
    """
    # Before OpenCV is imported: a damaged image gets its line at the end, and must not print into the progress bar.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    from tqdm import tqdm

    from yolonas.inference.detector import Detector
    from yolonas.inference.outputs import close_all
    from yolonas.inference.sources import list_sources
    from yolonas.inference.video import Video

    items: list[Any] = list(dict.fromkeys(list_sources(list(source))))  # paths, web addresses and videos
    detector = Detector(weights, device, runtime, precision)
    wanted = class_numbers(classes, detector.names)
    tracking = Tracking(detector.manifest.conf if conf is None else conf, detector.lowest_conf) if track else None
    outputs = _outputs(items, detector.names, out, no_images, **saving)
    unreadable: list[DataError] = []
    tally = _Tally()
    interrupted = False
    with tqdm(total=_total(items, vid_stride), unit="image", disable=None) as progress:

        def report(error: DataError) -> None:
            unreadable.append(error)
            progress.update()

        stream = detector.stream(
            items,
            tracking.low if tracking else conf,
            iou,
            max_det,
            batch,
            imgsz,
            stride=vid_stride,
            classes=wanted,
            agnostic_nms=agnostic_nms,
            on_error=report,
        )
        try:
            with _Stop() as stop, closing(stream):
                for detections in stream:
                    found = tracking.update(detections) if tracking else detections
                    for output in outputs:
                        output.write(found)
                    tally.add(found)
                    progress.update()
                    if interrupted := stop.asked:
                        break
        except KeyboardInterrupt:
            interrupted = True
        finally:
            written = close_all(outputs)
    for line in written:
        click.echo(line)
    if unreadable:
        what = "sources" if any(isinstance(item, Video) for item in items) else "images"
        click.echo(
            f"{len(unreadable)} of {len(items)} {what} could not be read{' to the end' * (what == 'sources')}:",
            err=True,
        )
        for error in unreadable:
            click.echo(f"  {error}", err=True)
    if not tally.count and not interrupted:
        raise DataError("no image could be read")
    click.echo(tally.summary())
    if detector.choice.milliseconds:
        click.echo(detector.choice.report())
    if interrupted and not any(isinstance(item, Video) and item.live for item in items):
        raise SystemExit(130)


def class_numbers(classes: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """The numbers of classes given by number or name, several in one text parted by commas; None for none given."""
    parts = [part.strip() for text in classes for part in ([text] if text in names else text.split(","))]
    numbers = []
    for part in filter(None, parts):
        if part in names:
            numbers.append(names.index(part))
        elif part.isdecimal() and int(part) < len(names):
            numbers.append(int(part))
        else:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise click.BadParameter(
                f"there is no class {part!r} among {len(names)}: {known}", param_hint="'--classes'"
            )
    return sorted(set(numbers)) or None


class Tracking:
    """A tracker for each video; images that are none of a video are one sequence."""

    def __init__(self, conf: float, lowest: float = 0.0) -> None:
        self.high, self.low = conf, min(conf, max(0.1, lowest))  # one that is too low is refused where images are read
        self._video: str | None = None
        self._tracker: Tracker | None = None

    def update(self, detections: Detections) -> Detections:
        from yolonas.inference.tracker import Tracker

        video = None if detections.frame is None else detections.path
        if self._tracker is None or video != self._video:
            self._tracker, self._video = Tracker(self.high, self.low), video
        return self._tracker.update(detections)


class _Tally:
    """What was found, in numbers."""

    def __init__(self) -> None:
        self.images = self.frames = 0
        self._classes: Counter[str] = Counter()
        self._start = time.perf_counter()

    @property
    def count(self) -> int:
        return self.images + self.frames

    def add(self, detections: Detections) -> None:
        self.images += detections.frame is None
        self.frames += detections.frame is not None
        self._classes.update(d.name for d in detections)

    def summary(self) -> str:
        seconds = time.perf_counter() - self._start
        kinds = [f"{n} {kind}" for n, kind in ((self.images, "images"), (self.frames, "frames")) if n]
        listed = ", ".join(f"{count} {name}" for name, count in self._classes.most_common(10))
        found = f"{self._classes.total()} objects{f' ({listed})' if listed else ''}"
        return f"{' and '.join(kinds) or '0 images'}, {found}, {self.count / seconds:.1f} images/s"


def _outputs(items: list[Item], class_names: Sequence[str], out: Path, no_images: bool, **saving: Any) -> list[Output]:
    from yolonas.inference import outputs

    outputs.make_folder(out)
    names = outputs.Names(items)
    made: list[Output] = []
    if not no_images:
        made.append(outputs.Pictures(out, names, items))
    if (file := saving["save_json"]) is not None:
        made.append(outputs.Json(Path(file or out / "predictions.json")))
    if (file := saving["save_jsonl"]) is not None:
        made.append(outputs.JsonLines(Path(file or out / "predictions.jsonl")))
    if (file := saving["save_coco"]) is not None:
        made.append(outputs.Coco(Path(file or out / "coco.json"), class_names, names))
    if saving["save_txt"]:
        made.append(outputs.Labels(out / "labels", names, saving["save_conf"]))
    if saving["save_crop"]:
        made.append(outputs.Crops(out / "crops", names))
    if saving["save_frames"]:
        made.append(outputs.Frames(out / "frames", names))
    return made


def _total(items: Sequence[Item], stride: int) -> int | None:
    """How many images and frames there will be, for the progress bar; None where nobody knows."""
    from yolonas.inference.video import Video

    counts = [item.frame_count() if isinstance(item, Video) else stride for item in items]
    return None if None in counts else sum(-(-count // stride) for count in counts if count is not None)


class _Stop:
    """Ctrl-C, and SIGTERM by which services are stopped: the first one only sets `asked`, a second one interrupts.

    So the image at hand gets into all files or none, and no file is cut within a line.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _Stop:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, b"\nStopping after this image; once more stops at once.\n")  # print may be at work below
