"""The page that `results.py` writes: a table of the measurements, the figure, and a table of published scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from itune.files import atomic_path

Json = dict[str, Any]
BASE = "i-tuning"
"""The row that the others are compared with."""

PROMPTED = "²"
"""Marks rows on the language model that was trained with prompts."""
_PROMPTED_NOTE = f"""{PROMPTED} On a frozen language model of the same size that has 128 positions and was trained with
prompts of retrieved captions (`recipes/prompted_language_model.py`). The packaged model's has 64 positions
and was trained on bare captions, so every text after a prompt is new to it.

"""
PUBLISHED: tuple[tuple[str, str, str, str, str], ...] = (
    ("I-Tuning base (Luo et al. 2022)", "14", "116.7", "61.5", "67.8"),
    ("I-Tuning medium", "44", "120.0", "72.3", "75.4"),
    ("I-Tuning large", "95", "119.4", "75.4", "78.5"),
    ("I-Tuning large, VLP", "95", "122.2", "77.2", ""),
    ("I-Tuning large, VLP, 18 layers dropped", "47", "122.1", "79.2", "78.9 without VLP"),
    ("ClipCap (Mokady et al. 2021)", "43", "113.1", "", "65.8"),
    ("SmallCap (Ramos et al. 2023)", "7", "119.7", "", ""),
    ("OSCAR base (Li et al. 2020)", "", "123.7; 115.6 without tags", "", ""),
    ("Unified VLP (Zhou et al. 2020)", "", "117.7", "", ""),
    ("XGPT (Xia et al. 2020)", "", "120.1", "", ""),
    ("UniTAB (Yang et al. 2022)", "", "119.1", "", ""),
    ("VL-T5 (Cho et al. 2021)", "", "116.5", "", ""),
)
"""Captioner, trained parameters in millions, CIDEr-D on COCO Karpathy test, Flickr30k test, NoCaps overall."""


def write_results(content: Json, output: Path) -> None:
    """Write `output` in Markdown, and the figure beside it as .png."""
    figure = output.with_suffix(".png")
    _draw([row for row in content["rows"] if row["name"] in content["latency"]["ms"]], figure)
    with atomic_path(output) as temporary:
        temporary.write_text(_page(content, figure.name), encoding="utf-8")


def _page(content: Json, figure: str) -> str:
    budget, timing, rows = content["budget"], content["latency"], content["rows"]
    machine, scores = timing["machine"], rows[0]["scores"]
    prompted = any(PROMPTED in row["title"] for row in rows)
    return f"""# Results

Which method captions best after the same training? `python benchmarks/results.py write` writes this page from
`docs/results.json`.

Every captioner uses the packaged model's frozen vision tower and language model (6 layers of
384{f"; except rows marked {PROMPTED}" if prompted else ""}). Each was trained once, on the same
{budget["photos"]:,} photos of Flickr8k for {budget["epochs"]} epochs, with the same schedule, batch size and
regularisation, and with its own learning rate (`benchmarks/method_runs.py`). This is a short
training: it shows which method learns fast from little data.

Scores belong to the exported {timing["precision"]} bundle with {budget["num_beams"]} beams on the
{scores["images"]:,} dev photos, x 100, with 95 % bootstrap intervals over the photos. Another seed may move them by
more than the interval. The best epoch was chosen on the first {budget["flags"]["--dev-images"]} of the same photos.

{_table(*_measured(rows, timing))}

{_PROMPTED_NOTE if prompted else ""}\
- *Shown*: retrieved captions in the prompt, averaged over the timed photos. We asked for
  {budget["retrieve"]}; those for which the language model has no positions are left out. They come from the
  training captions, without a training photo's own.
- *Training*: CPU time, including the evaluation after each epoch, and the process's own peak memory, without the
  memory-mapped embeddings. The first training run with retrieval also stores what is retrieved for each photo.
- *Against I-Tuning*: the difference in CIDEr-D from the first row, where the paired test, corrected for the number of
  scores, finds more than noise.
- *Latency*: one photo of {timing["photos"]}, {timing["num_beams"]} beams, from the file to the caption: median (10th to
  90th percentile), captioners alternating, {machine["threads"]} threads of {machine["cpu"]}, {machine["date"][:10]}.

![CIDEr-D against trainable parameters]({figure})

## Published

What the papers report, x 100, on datasets and with models that we did not run: COCO Karpathy test, Flickr30k test and
NoCaps overall.

{_table(("captioner", "trained, M", "COCO", "Flickr30k", "NoCaps"), PUBLISHED)}
"""


def _measured(rows: Sequence[Json], timing: Json) -> tuple[Sequence[str], list[Sequence[str]]]:
    heading = (
        *("method", "shown", "trainable", "training", "memory", "CIDEr-D", "against I-Tuning", "BLEU-4", "METEOR"),
        "latency, ms",
    )
    lines = []
    for row in rows:
        scores, resources = row["scores"], row["resources"]
        ms = timing["ms"].get(row["name"])
        trained = row["name"] in timing["ms"]
        lines.append(
            (
                row["title"],
                _shown(row, timing),
                f"{row['trainable'] / 1e6:.2f}M" if trained else "as above",
                f"{resources['cpu_seconds'] / 60:.0f} min" if trained else "",
                f"{resources['peak_mib'] / 1024:.1f} GiB" if trained else "",
                _with_interval(scores, "cider"),
                _difference(row),
                _with_interval(scores, "bleu4"),
                _with_interval(scores, "meteor") if scores.get("meteor") is not None else "not measured",
                f"{ms['median']:.0f} ({ms['p10']:.0f}-{ms['p90']:.0f})" if ms else "",
            )
        )
    return heading, lines


def _shown(row: Json, timing: Json) -> str:
    if row["name"] not in timing["ms"]:
        return "0"
    captions = timing["retrieved"].get(row["name"])
    return "" if captions is None else f"{captions:.1f}"


def _with_interval(scores: Json, name: str) -> str:
    low, high = scores["intervals"][name]
    return f"{100 * scores[name]:.1f} ({100 * low:.1f}-{100 * high:.1f})"


def _difference(row: Json) -> str:
    if row["against"] is None:
        return ""
    found = row["against"]["cider"]
    return f"{100 * found['difference']:+.1f}" if found["significant"] else "within noise"


def _table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *(["---:"] * (len(heading) - 1))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *lines))


def _draw(rows: Sequence[Json], path: Path) -> None:
    """CIDEr-D with its interval against trainable parameters, like the I-Tuning paper's Figure 1."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2))
    taken: dict[int, int] = {}
    for row, marker in zip(rows, "osD^vPX*"):  # noqa: B905 - there are more markers than rows
        middle = 100 * row["scores"]["cider"]
        low, high = (100 * value for value in row["scores"]["intervals"]["cider"])
        column = round(row["trainable"] / 1e5)
        neighbours = taken[column] = taken.get(column, -1) + 1
        x = row["trainable"] / 1e6 + 0.08 * neighbours
        axes.errorbar(x, middle, [[middle - low], [high - middle]], fmt=marker, capsize=3, label=row["title"])
    axes.set_xlabel("trainable parameters, millions (equal ones stand side by side)")
    axes.set_ylabel("CIDEr-D x 100, Flickr8k dev")
    axes.margins(x=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
