"""The section of a report on which errors are made, and which classes are taken for each other."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from yolonas.analysis import Analysis, Verdict
from yolonas.training.charts import svg

MATRIX_CLASSES = 12  # with more a matrix of numbers does not fit a page
CONFUSED_PAIRS = 20


def confusion_section(analysis: Analysis) -> str:
    """The kinds of error, and a matrix of classes; with many classes the most confused pairs and a map."""
    counts = error_counts(analysis)
    wrong = ", ".join(f"<b>{count}</b> {name}" for name, count in counts.items())
    intro = (
        f"<p>At the operating threshold <b>{analysis.right}</b> boxes are right. The errors: {wrong}.</p>"
        '<p class="note">Boxes of the right class meet first, then what is left meets whatever its class, at an IoU of '
        "0.5 and more. A badly lying box overlaps an object of its class by 0.1 to 0.5.</p>"
    )
    names = [c.name for c in analysis.classes]
    if len(names) <= MATRIX_CLASSES:
        return intro + _matrix(analysis, names)
    pairs = analysis.confusions()
    rows = "".join(
        f'<tr><th scope="row"><bdi>{escape(names[truth])}</bdi></th><td class="words"><bdi>{escape(names[found])}</bdi>'
        f"</td><td>{count}</td><td>{count / analysis.classes[truth].objects * 100:.0f} %</td></tr>"
        for truth, found, count in pairs[:CONFUSED_PAIRS]
    )
    shown = f"The {CONFUSED_PAIRS} most frequent of {len(pairs)} pairs" if len(pairs) > CONFUSED_PAIRS else "Pairs"
    table = (
        f'<h3>{shown} of classes taken for each other</h3><div class="scroll"><table><thead><tr>'
        '<th class="words">is</th><th class="words">predicted as</th><th>times</th><th>of its objects</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        if pairs
        else "<p>No class is taken for another.</p>"
    )
    heat = f'<div class="scroll">{_heat_map(analysis, names)}</div>'
    return f"{intro}{table}<details><summary>The whole matrix, as a map</summary>{heat}</details>"


def _matrix(analysis: Analysis, names: Sequence[str]) -> str:
    last = len(names)
    rows = []
    for truth in range(last + 1):
        total = int(analysis.confusion[truth].sum())
        cells = []
        for found in range(last + 1):
            count = int(analysis.confusion[truth, found])
            share = count / total if total else 0.0
            kind = "same" if truth == found else "empty" if not count else ""
            percent = f"<small>{share * 100:.0f} %</small>" if count and truth < last else ""
            cells.append(
                '<td class="empty"></td>'
                if truth == found == last
                else f'<td class="{kind}" style="--s:{share:.3f}">{count}{percent}</td>'
            )
        name = f"<bdi>{escape(names[truth])}</bdi>" if truth < last else "nothing there"
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col"><bdi>{escape(name)}</bdi></th>' for name in names)
    return (
        '<div class="scroll"><table class="matrix"><thead><tr><th scope="col">is &#8595; &nbsp; predicted &#8594;</th>'
        f'{head}<th scope="col">missed</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        '<p class="note">Percentages are of the true objects of the row; the last row are boxes without an object.</p>'
    )


def _heat_map(analysis: Analysis, names: Sequence[str]) -> str:
    """All classes, rows the truth; a cell's opacity is its share of the row."""
    size, left, top = 9, 90, 12
    labels = [*names, "nothing"]
    totals = analysis.confusion.sum(axis=1)
    parts = [
        f'<text x="{left - 4}" y="{top + row * size + 7}" text-anchor="end">{escape(_short(name))}</text>'
        for row, name in enumerate(labels)
    ]
    truths, founds = analysis.confusion.nonzero()
    for truth, found in zip(truths.tolist(), founds.tolist(), strict=True):
        count = int(analysis.confusion[truth, found])
        said = f"{labels[truth]}, predicted {labels[found]}: {count}"
        if found == len(names):
            said = f"{labels[truth]}, missed: {count}"
        parts.append(
            f'<rect class="cell{" same" if truth == found else ""}" x="{left + found * size}" y="{top + truth * size}" '
            f'width="{size - 1}" height="{size - 1}" opacity="{0.12 + 0.88 * count / totals[truth]:.2f}">'
            f"<title>{escape(said)}</title></rect>"
        )
    side = size * len(labels)
    parts.append(f'<text x="{left + side}" y="{top - 4}" text-anchor="end">missed</text>')
    title = "confusion matrix: rows are the truth, columns the predictions in the same order"
    return svg(title, left + side, top + side, "".join(parts), "heat")


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"


def error_counts(analysis: Analysis) -> dict[str, int]:
    """How many errors there are of each kind, which the key names in the plural."""

    def count(verdict: Verdict) -> int:
        return sum(image.count(verdict) for image in analysis.images)

    return {
        "missed objects": sum(len(image.missed) for image in analysis.images),
        "boxes where there is nothing": count(Verdict.BACKGROUND),
        "boxes that lie badly": count(Verdict.POOR_BOX),
        "second boxes on one object": count(Verdict.DUPLICATE),
        "wrong classes": count(Verdict.WRONG_CLASS),
    }
