"""The comparison as a picture: quality against latency; the larger the mark, the larger the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...files import atomic_path
from .comparison import Row


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Write a PNG. Quality is CIDEr-D or, without scores, the agreement of the most likely tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    largest = max(row.megabytes for row in rows)
    qualities = [100 * (row.fidelity.top1 if row.cider is None else row.cider) for row in rows]
    for row, quality in zip(rows, qualities, strict=True):
        size = 4 + 14 * (row.megabytes / largest) ** 0.5
        label = f"{row.name}, {row.megabytes:.0f} MB"
        axes.plot(row.latency.total, quality, "o", markersize=size, alpha=0.6, label=label)
    axes.set_xlim(0, 1.1 * max(row.latency.total for row in rows))
    # The range is at least a tenth of the best quality, so that noise does not fill the picture.
    middle, span = (max(qualities) + min(qualities)) / 2, max(qualities) - min(qualities)
    half = 0.65 * max(span, 0.1 * max(qualities), 1)
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlabel("milliseconds per photo, batch 1 (median)")
    axes.set_ylabel("CIDEr-D x 100" if rows[0].cider is not None else "most likely token as in fp32, %")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", labelspacing=1)
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_figure(temporary, format="png")
