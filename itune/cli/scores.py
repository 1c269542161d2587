"""The output of itune-eval: tables of scores with their intervals, comparisons, JSON, scores per image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_path
from ..metrics import SCORES, Difference, Evaluation, compare_groups, evaluate
from ..metrics.evaluation import ALPHA
from ..runtime.errors import ItuneError
from . import common

if TYPE_CHECKING:
    from ..data.records import Record

HEADINGS = dict(
    zip(SCORES, ("CIDEr-D", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "SPICE"), strict=True)
)
OVERALL = "overall"
_DOMAINS = ("in-domain", "near-domain", "out-domain")

Intervals = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Captioned:
    """One captioner's name, and its captions by image id."""

    name: str
    captions: Mapping[str, str]


@dataclass(frozen=True)
class _Scored:
    """One captioner's scores, overall and per domain."""

    name: str
    groups: Mapping[str, Evaluation]
    intervals: Mapping[str, Intervals]

    @property
    def overall(self) -> Evaluation:
        return self.groups[OVERALL]


def report(
    found: Sequence[Captioned],
    records: Sequence[Record],
    what: str,
    *,
    failed: int,
    java: bool,
    json_file: str | None,
    per_image: Path | None,
) -> None:
    """Score one captioner, or compare two, against the records' captions; print and write what is asked for.

    `json_file` "-" prints the scores as JSON instead of the table.

    Raises ItuneError for captions of images without references, and for two captioners of different images.
    """
    references = {record.id: record.references for record in records}
    domains = {record.id: record.domain for record in records}
    _check_images(found, records)
    scored = [_score(captioner, references, domains, java=java) for captioner in found]
    overall = scored[0].overall
    uncaptioned = len(references) - len(overall.images)
    if uncaptioned > failed:
        common.warn(
            f"{uncaptioned} of {len(references)} images have no caption and do not count: these are not the scores of "
            "the whole split"
        )
    if wordless := sum(len(record.wordless) for record in records if record.id in set(overall.images)):
        common.warn(f"{wordless} references have no letters; they count, as in the COCO caption evaluation code")
    if len(overall.images) == 1:
        common.warn("CIDEr-D of a single image is 0: each of its words is in every image, so that none has a weight")
    comparison = compare_groups(scored[0].groups, scored[1].groups) if len(scored) == 2 else None
    if per_image:
        _write_per_image(scored, found, domains, per_image)
    if json_file:
        content = _as_json(scored[0]) | {"failed": failed, "uncaptioned": uncaptioned, "missing": overall.missing}
        if comparison is not None:
            content |= {"captions": scored[0].name, "against": _as_json(scored[1]) | {"captions": scored[1].name}}
            content["comparison"] = {
                group: {name: _difference_json(value) for name, value in differences.items()}
                for group, differences in comparison.items()
            }
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        if json_file == "-":
            print(text)
            return
        _write(Path(json_file), text)
    _print_tables(scored, comparison, what)


def _check_images(found: Sequence[Captioned], records: Sequence[Record]) -> None:
    references = {record.id for record in records}
    wrong = None
    if any(record.domain == OVERALL for record in records):
        wrong = f"the references have a domain {OVERALL!r}, the name of the whole set: rename it"
    for here, there in zip(found, reversed(found), strict=True):
        if unknown := [image for image in here.captions if image not in references]:
            wrong = (
                f"{here.name}: {len(unknown)} of its {len(here.captions)} images have no reference captions (the "
                f"first: {unknown[0]!r}); give the references and the --split that they belong to"
            )
        elif alone := [image for image in here.captions if image not in there.captions]:
            wrong = (
                f"{there.name}: has no caption of {len(alone)} images of {here.name} (the first: {alone[0]!r}); only "
                "captions of the same images can be compared"
            )
        if wrong:
            raise ItuneError(wrong)


def _score(
    captioner: Captioned, references: Mapping[str, Sequence[str]], domains: Mapping[str, str | None], *, java: bool
) -> _Scored:
    """Scores in the order of the references, which pairs the images of two captioners."""
    captions = {image: captioner.captions[image] for image in references if image in captioner.captions}
    overall = evaluate(captions, references, java=java)
    present = {domains[image] for image in captions} - {None}
    names = [name for name in _DOMAINS if name in present] + sorted(str(name) for name in present - set(_DOMAINS))
    groups = {name: overall.select([image for image in captions if domains[image] == name]) for name in names}
    groups[OVERALL] = overall
    return _Scored(captioner.name, groups, {name: group.intervals() for name, group in groups.items()})


def _as_json(scored: _Scored) -> dict[str, Any]:
    values = {name: _group_json(group, scored.intervals[name]) for name, group in scored.groups.items()}
    overall = values.pop(OVERALL)
    return overall | ({"domains": values} if values else {})


def _group_json(group: Evaluation, intervals: Intervals) -> dict[str, Any]:
    scores = group.scores()
    return {name: scores.get(name) for name in SCORES} | {"images": len(group.images), "intervals": dict(intervals)}


def _difference_json(value: Difference) -> dict[str, Any]:
    return {
        "difference": value.difference,
        "interval": [value.low, value.high],
        "p": value.p,
        "p_holm": value.p_holm,
        "significant": value.significant,
    }


def _write_per_image(
    scored: Sequence[_Scored], found: Sequence[Captioned], domains: Mapping[str, str | None], path: Path
) -> None:
    lines = []
    for captioner, own in zip(found, scored, strict=True):
        scores = own.overall.per_image()
        for row, image in enumerate(own.overall.images):
            value: dict[str, Any] = {"captions": captioner.name} if len(found) > 1 else {}
            value |= {"image_id": image, "caption": captioner.captions[image]}
            value |= {"domain": domains[image]} if domains[image] else {}
            value |= {name: float(scores[name][row]) for name in SCORES if name in scores}
            lines.append(json.dumps(value, ensure_ascii=False, allow_nan=False))
    _write(path, "\n".join(lines))


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _print_tables(
    scored: Sequence[_Scored], comparison: Mapping[str, Mapping[str, Difference]] | None, what: str
) -> None:
    from rich.text import Text

    overall = scored[0].overall
    names = [name for name in SCORES if all(name in own.overall.names for own in scored)]
    labels = [Path(own.name).name for own in scored]
    if len(set(labels)) < len(labels):
        labels = [own.name for own in scored]
    title = " against ".join(labels)
    several = len(scored) > 1 or len(scored[0].groups) > 1
    table = common.score_table(
        f"{title}, {what}: {len(overall.images)} photos (x 100, 95 % intervals)",
        [*([""] if several else []), *(HEADINGS[name] for name in names)],
    )
    for group, evaluation in scored[0].groups.items():
        label = f"{group} ({len(evaluation.images)})" if len(scored[0].groups) > 1 else ""
        for own, name in zip(scored, labels, strict=True):
            row = _score_cells(own.groups[group], own.intervals[group], names)
            head = " ".join(part for part in (label, name if len(scored) > 1 else "") if part)
            table.add_row(*([Text(head)] if several else []), *row)
        if comparison is not None:
            table.add_row("difference", *(_difference_cell(comparison[group][name]) for name in names), style="bold")
            table.add_section()
    common.print_result(table)
    if comparison is not None:
        tests = sum(len(differences) for differences in comparison.values())
        common.print_result(
            f"difference: second minus first; -: not significant (paired randomisation test, p < {ALPHA} after "
            f"Holm's correction for {tests} scores)"
        )
    for name, reason in {**scored[-1].overall.missing, **overall.missing}.items():
        common.warn(f"{HEADINGS[name]}: {reason}")


def _score_cells(evaluation: Evaluation, intervals: Intervals, names: Sequence[str]) -> list[str]:
    scores = evaluation.scores()
    bounds = [tuple(f"{100 * bound:.1f}" for bound in intervals[name]) for name in names]
    return [f"{100 * scores[name]:.2f}\n{low}-{high}" for name, (low, high) in zip(names, bounds, strict=True)]


def _difference_cell(value: Difference) -> str:
    if not value.significant:
        return "-"
    return f"{100 * value.difference:+.2f}\n{100 * value.low:+.1f} to {100 * value.high:+.1f}"
