"""Plots of `sweep.py`: one for every sweep with at least two points, and one of the precisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from artifacts import BASE, label

from itune.files import atomic_path

Json = dict[str, Any]
_FIELDS = {
    "beams": ("num_beams", "beams"),
    "new-tokens": ("new_tokens", "new tokens"),
    "batch": ("batch_size", "batch"),
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write sweep-NAME.png files; returns them."""
    entries: list[Json] = results["points"]
    if not entries:
        return []
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    usual: Json = results["usual"]
    size = usual["size"]
    about = results["machine"]
    caption = f"{about['threads']} threads of {about['cpu']}, {about['date'][:10]}; bands from minimum to maximum"
    made = []

    def save(name: str, figure: Any) -> None:
        figure.text(0.01, 0.01, caption, fontsize=7, color="gray")
        figure.tight_layout(rect=(0, 0.03, 1, 1))
        path = folder / f"sweep-{name}.png"
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
        pyplot.close(figure)
        made.append(path)

    for name, (field, words) in _FIELDS.items():
        along = _along(entries, field, usual)
        if len(along) > 1:
            save(name, _lines(pyplot, along, field, words, f"GPT-2 {size}, {_others(usual, field)}"))
    along = _along(entries, "size", usual)
    if len(along) > 1:
        save("sizes", _lines(pyplot, along, "size", "GPT-2", _others(usual, "size")))
    here = [entry for entry in entries if entry["point"] == usual]
    if here:
        save("precisions", _bars(pyplot, here[0]["summary"], f"GPT-2 {size}, {_others(usual, 'size')}"))
    return made


def _others(usual: Json, field: str) -> str:
    texts = {other: f"{usual[other]} {words}" for other, words in _FIELDS.values()}
    texts["batch_size"] = f"batch {usual['batch_size']}"
    return ", ".join(text for other, text in texts.items() if other != field)


def _along(entries: list[Json], field: str, usual: Json) -> list[Json]:
    """The points that differ from `usual` at most in one field, sorted by it (sizes: as measured)."""
    found = [e for e in entries if all(e["point"][f] == v for f, v in usual.items() if f != field)]
    return found if field == "size" else sorted(found, key=lambda e: e["point"][field])


def _lines(pyplot: Any, along: list[Json], field: str, words: str, title: str) -> Any:
    """Median time per contestant, or photos per second; dashed for decoding alone."""
    from matplotlib.ticker import LogFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    names = list(dict.fromkeys(name for entry in along for name in entry["summary"]))
    for name in names:
        own = [entry for entry in along if name in entry["summary"]]
        part = "total" if "total" in own[0]["summary"][name] else "decode"
        batch = np.array([entry["point"]["batch_size"] for entry in own])
        low, middle, high = (
            np.array([entry["summary"][name][part][key] for entry in own]) for key in ("min_ms", "median_ms", "max_ms")
        )
        if field == "batch_size":
            low, middle, high = (1e3 * batch / ms for ms in (high, middle, low))
        x = [entry["point"][field] for entry in own]
        style = "o-" if part == "total" else "o--"
        lines = axes.plot(x, middle, style, markersize=3, label=label(name) + ("" if part == "total" else " (decode)"))
        if field != "size":
            axes.fill_between(x, low, high, color=lines[0].get_color(), alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    if field == "batch_size":
        axes.set_xscale("log", base=2)
    if field != "size":
        values = [entry["point"][field] for entry in along]
        axes.set_xticks(values, [str(value) for value in values])
    axes.set_xlabel(words)
    axes.set_ylabel("photos per second" if field == "batch_size" else "ms, encoded and decoded")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    return figure


def _bars(pyplot: Any, summary: dict[str, Any], title: str) -> Any:
    """One bar per contestant, of encoding and decoding, with its speed-up over eager."""
    figure, axes = pyplot.subplots(figsize=(7, 0.9 + 0.35 * len(summary)))
    names = list(reversed(summary))
    left = [0.0] * len(names)
    for part, color in (("encode", "tab:blue"), ("decode", "tab:orange")):
        widths = [summary[name].get(part, {}).get("median_ms", 0.0) for name in names]
        axes.barh([label(name) for name in names], widths, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, name in enumerate(names):
        if name != BASE and "total" in summary[name]:
            axes.text(left[y], y, f" {summary[name]['total']['speedup']:.1f}x", va="center", fontsize=8)
    axes.set_xlabel("ms, medians")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.1)
    axes.legend(fontsize=7, loc="lower right")
    return figure
