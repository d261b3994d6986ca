"""One HTML file about a run and its result on validation images, for people: no network, no scripts, light and dark.

File names, class names and whatever else comes from outside pass through `escape`; beyond that the page's own security
policy forbids scripts and requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from yolonas.analysis import Analysis, analyse
from yolonas.atomic import atomic_file
from yolonas.data.labelled import LabelledImages
from yolonas.inference.detections import Detections
from yolonas.training.charts import Series, line_chart, precision_recall_chart
from yolonas.training.report import EpochReport
from yolonas.training.report_confusion import MATRIX_CLASSES, confusion_section, error_counts
from yolonas.training.report_gallery import suspects_section, worst_section

DROPPED_LINES = 100
Section = tuple[str, str, str]  # id, heading, content


def write_html(
    path: Path,
    *,
    title: str,
    data: LabelledImages | None,
    detections: Sequence[Detections] = (),
    history: Sequence[EpochReport] = (),
    record: Mapping[str, Any] | None = None,
    threshold: float | None = None,
    dropped: Sequence[str] = (),
) -> None:
    """Write the report of a run, or of a measurement, to `path`.

    `detections` are of the images of `data`, in their order, down to a low score, as `predict_dataset` gives them;
    `data` may be without images, and is None while a run goes on; `history` and `record` may be empty: the page then
    says so or leaves the part out.
    `threshold` is the operating threshold, by default the one with the best F1 on `data`. `record` is a checkpoint's
    (see `trainer`): recipe, start, train_images, train_objects, epoch, seconds, device; `reasons` maps fields of the
    recipe to why they were chosen. `dropped` are lines on what was left out of the training data; those on `data` are
    known. Images are read again for the pictures; one that is gone leaves a placeholder.

    Raises what `coco_ap` raises, and OSError where the file cannot be written.
    """
    record = record or {}
    sections: list[Section] = []
    if data is not None and data.images:
        analysis = analyse(data, detections, threshold)
        summary = _headline(analysis) + f'<p class="reading">{_reading(analysis)}</p>'
        summary += _threshold_note(analysis, threshold)
    else:
        analysis = None
        unknown = (
            "The run is not over: what the model does right and wrong is told here at its end."
            if data is None
            else "There were no validation images to choose the weights by: they are the last ones. The curves show "
            "their accuracy on the way, on images that were watched only."
            if any(report.ap is not None for report in history)
            else "There were no validation images, so nothing is known about the accuracy: hold some labelled images "
            "back to see it here."
        )
        summary = f'<p class="reading">{unknown}</p>'
    if history:
        sections.append(("curves", "Curves", _curves(history)))
    if data is not None and analysis is not None:
        sections.append(("classes", "Classes", _classes(analysis)))
        sections.append(("confusion", "What is taken for what", confusion_section(analysis)))
        sections.append(("worst", "Images with the most errors", worst_section(data, analysis)))
        sections.append(("labels", "Labels to look at again", suspects_section(data, detections, analysis)))
    if record.get("recipe"):
        sections.append(("recipe", "How it was trained", _recipe(record)))
    left_out = [*dropped, *(data.dropped if data is not None else ())]
    if left_out:
        sections.append(("data", "Left out of the data", _dropped(left_out)))
    page = _page(title, summary + _facts(record, history, analysis), sections)
    with atomic_file(Path(path)) as file:
        file.write(page.encode("utf-8", "backslashreplace"))  # a file name may hold bytes that are no text


def _page(title: str, summary: str, sections: Sequence[Section]) -> str:
    style = resources.files("yolonas.training").joinpath("report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    parts = "\n".join(
        f'<section id="{name}"><h2>{heading}</h2>\n{content}</section>' for name, heading, content in sections
    )
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{summary}
<nav>{links}</nav>
</header>
<main>
{parts}
</main>
<footer>yolonas {escape(metadata.version("yolonas"))}, {escape(now)}. This file needs nothing else: keep it, print it,
send it. It contains parts of the images.</footer>
</body>
</html>
"""


def _headline(analysis: Analysis) -> str:
    metrics = analysis.metrics
    tiles = [
        ("AP", metrics.ap, "COCO's average precision, IoU 0.50 to 0.95"),
        ("AP50", metrics.ap50, "average precision at IoU 0.50"),
        ("AP75", metrics.ap75, "average precision at IoU 0.75"),
        ("Precision", analysis.precision, "share of the drawn boxes that are right, at the operating threshold"),
        ("Recall", analysis.recall, "share of the objects that are found, at the operating threshold"),
        ("F1", analysis.f1, "harmonic mean of precision and recall"),
    ]
    cells = "".join(
        f'<div class="tile{"" if k else " first"}" title="{escape(meaning)}"><dt>{name}</dt><dd>{value:.3f}</dd></div>'
        for k, (name, value, meaning) in enumerate(tiles)
    )
    return f'<dl class="tiles">{cells}</dl>'


def _reading(analysis: Analysis) -> str:
    """One or two sentences for people who do not read AP."""
    if not analysis.metrics.objects:
        return "The validation images have no objects, so only false boxes can be counted."
    if not analysis.right:
        return "On these images the model finds no object: it has not learned the task yet."
    text = (
        f"Of 100 objects it finds <b>{analysis.recall * 100:.0f}</b>, and of 100 boxes it draws "
        f"<b>{analysis.precision * 100:.0f}</b> are right, keeping those that score above {analysis.threshold:.2f}."
    )
    known = [c for c in analysis.classes if c.ap is not None]
    weakest = min(known, key=lambda c: c.ap or 0.0)
    if len(known) > 1:
        text += (
            f" Its weakest class is <b><bdi>{escape(weakest.name)}</bdi></b> (AP {weakest.ap:.2f}, "
            f"{_many(weakest.objects, 'object')})"
        )
    else:
        text += " That is"
    counts = error_counts(analysis)
    most = max(counts, key=lambda name: counts[name])
    if counts[most]:
        share = counts[most] / sum(counts.values())
        joint = "; " if len(known) > 1 else " with errors of which "
        text += f"{joint}{share * 100:.0f} % of its errors are {most}."
    else:
        text += "; it makes no error." if len(known) > 1 else " without a single error."
    return text


def _threshold_note(analysis: Analysis, given: float | None) -> str:
    best = analysis.metrics
    if given is None:
        text = (
            f"The operating threshold, {analysis.threshold:.3f}, is the score with the best F1 on these very images; "
            "on new ones expect slightly less."
        )
    else:
        text = (
            f"The operating threshold, {analysis.threshold:.3f}, is the checkpoint's; on these images the best F1 "
            f"would be {best.f1:.3f} at {best.threshold:.3f}."
        )
    return f'<p class="note">{text} A box is right where it overlaps a true box of its class by an IoU of 0.5.</p>'


def _facts(record: Mapping[str, Any], history: Sequence[EpochReport], analysis: Analysis | None) -> str:
    facts: list[tuple[str, str]] = []
    if analysis is not None:
        facts.append(
            ("measured on", f"{_many(len(analysis.images), 'image')}, {_many(analysis.metrics.objects, 'object')}")
        )
    if "train_images" in record:
        objects = f", {_many(record['train_objects'], 'object')}" if "train_objects" in record else ""
        facts.append(("trained on", f"{_many(record['train_images'], 'image')}{objects}"))
    epochs = history[-1].epoch if history else record.get("epoch")
    seconds = history[-1].seconds if history else record.get("seconds")
    if epochs:
        facts.append(("epochs", f"{epochs}"))
    if seconds:
        facts.append(("minutes", f"{seconds / 60:.1f}"))
    if history:
        facts.append(("images/s", f"{history[-1].images_per_second:.1f}"))
    facts += [(name, str(record[name])) for name in ("device", "start") if record.get(name)]
    items = "".join(f"<li>{name} <b>{escape(value)}</b></li>" for name, value in facts)
    return f'<ul class="facts">{items}</ul>' if items else ""


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _curves(history: Sequence[EpochReport]) -> str:
    epochs = [report.epoch for report in history]
    losses = [
        Series(label, epochs, [getattr(report, name) for report in history], place)
        for place, (name, label) in enumerate(
            (("loss", "total"), ("classification", "classes"), ("iou", "IoU"), ("dfl", "DFL"))
        )
    ]
    measured = [report for report in history if report.ap is not None]
    accuracy = [
        Series(label, [r.epoch for r in measured], [getattr(r, name) for r in measured], place)
        for place, (name, label) in enumerate((("ap50", "AP50"), ("ap", "AP")))
    ]
    charts = [line_chart("Training loss", losses, x_name="epoch")]
    note = ""
    if measured:
        best = max(measured, key=lambda report: report.ap or 0.0)
        charts.append(line_chart("Validation", accuracy, x_name="epoch", top=1.0))
        note = f'<p class="note">Highest AP of a measured epoch: {best.ap:.3f}, in epoch {best.epoch}.</p>'
    rate = Series("learning rate", epochs, [report.lr for report in history])
    charts.append(line_chart("Learning rate", [rate], x_name="epoch"))
    return f'{note}<div class="charts">{"".join(charts)}</div>'


def _classes(analysis: Analysis) -> str:
    def cell(value: float | None, bar: bool = False) -> str:
        if value is None:
            return '<td class="faint">&ndash;</td>'
        return f'<td class="bar" style="--s:{value:.3f}">{value:.3f}</td>' if bar else f"<td>{value:.3f}</td>"

    ordered = sorted(analysis.classes, key=lambda c: (c.ap is None, -(c.ap or 0.0)))
    rows = "".join(
        f'<tr><th scope="row"><bdi>{escape(c.name)}</bdi></th><td>{c.objects}</td>{cell(c.ap, True)}{cell(c.ap50)}'
        f"{cell(c.precision)}{cell(c.recall)}</tr>"
        for c in ordered
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("objects", "AP", "AP50", "precision", "recall"))
    drawn = "".join(
        precision_recall_chart(
            c.name,
            c.curve.tolist(),
            c.ap50,
            (c.recall, c.precision) if c.recall is not None and c.precision is not None else None,
        )
        for c in ordered
        if c.ap50 is not None
    )
    curves = f'<div class="curves">{drawn}</div>'
    heading = "Precision over recall at IoU 0.5"
    note = (
        '<p class="note">Each curve is the best precision that keeps at least that recall, as COCO averages it into '
        "AP50 (the number); the dot is the operating point.</p>"
    )
    many = len(analysis.classes) > MATRIX_CLASSES
    if many:
        curves = f"<details><summary>{heading}, a curve for each class</summary>{note}{curves}</details>"
    else:
        curves = f"<h3>{heading}</h3>{note}{curves}"
    return (
        '<p class="note">Precision and recall at the operating threshold. A dash: no such object in these images, or '
        f'nothing predicted.</p><div class="scroll"><table class="classes{" dense" if many else ""}"><thead><tr>'
        f'<th scope="col" class="words">class</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>{curves}'
    )


def _recipe(record: Mapping[str, Any]) -> str:
    recipe, reasons = record["recipe"], record.get("reasons") or {}

    text = ""
    if reasons:
        rows = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th><td class="words">{escape(_plain(recipe.get(name)))}</td>'
            f'<td class="words">{escape(str(reason))}</td></tr>'
            for name, reason in reasons.items()
        )
        text = (
            '<div class="scroll"><table class="choices"><thead><tr><th class="words">choice</th>'
            '<th class="words">value</th><th class="words">because</th></tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    others = {name: _plain(value) for name, value in recipe.items() if name not in reasons}
    listed = "".join(f"<li>{escape(name)}: {escape(shown)}</li>" for name, shown in others.items())
    if listed:
        heading = "All other settings" if reasons else "All settings"
        text += f'<details><summary>{heading}</summary><ul class="plain">{listed}</ul></details>'
    return text


def _plain(value: Any) -> str:
    """A value of a recipe as people write it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(_plain(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _dropped(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines[:DROPPED_LINES])
    more = f"<li>and {len(lines) - DROPPED_LINES} more</li>" if len(lines) > DROPPED_LINES else ""
    return (
        f"<p>{_many(len(lines), 'entry').replace('entrys', 'entries')} of the data could not be used.</p>"
        f'<ul class="plain">{items}{more}</ul>'
    )
