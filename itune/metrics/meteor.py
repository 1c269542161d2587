"""METEOR 1.5, by its authors' Java program, as the COCO caption evaluation code runs it.

Denkowski and Lavie, "Meteor Universal: Language Specific Translation Evaluation for Any Target Language" (WMT 2014).
The program aligns each caption with its references and prints counts. The formula of section 2, with the parameters
for English, turns the counts of one image, or their sum over many, into a score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..runtime.errors import reading
from .java import UnavailableError, find_java, find_program, run_jar
from .statistics import Floats, Metric
from .tokenize import Pair

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGES = (1.0, 0.6, 0.8, 0.6)  # weights of exact, stem, synonym and paraphrase matches
COUNTS = 23
"""A line of the program: length of caption and reference; function words of both; for each stage, matched content words
of both and matched function words of both; chunks; matched words of both."""
_CHUNKS = 20


def meteor(pairs: Sequence[Pair]) -> Metric:
    """Score captions by METEOR. Raises UnavailableError if Java or the program is missing or fails."""
    jar = find_program("meteor", "meteor-1.5.jar")
    paraphrases = find_program("meteor", "data", "paraphrase-en.gz")
    java = find_java()
    lines = "".join(f"{_line(*pair)}\n" for pair in pairs)
    # By itself the program does not find its paraphrases in a folder whose name has a space.
    arguments = ["-", "-", "-stdio", "-l", "en", "-norm", "-a", str(paraphrases.relative_to(jar.parent))]
    printed = run_jar(java, jar, arguments, memory="2G", text=lines).splitlines()
    with reading(f"the counts of {jar.name} on {java.path}", UnavailableError):
        counts = np.array([line.split() for line in printed], np.float64).reshape(len(pairs), COUNTS)
    for row, (candidate, references) in zip(counts, pairs, strict=True):
        if not any(references) or (not candidate and not all(references)):
            row[[1, 3]] = 0  # counts of the empty reference, for which `_line` had to send a word
        if not candidate:
            row[[0, 2, *range(4, COUNTS)]] = 0  # counts of the caption, for which `_line` had to send a word
        if row[_CHUNKS] == 1 and (row[[0, 1]] == row[[21, 22]]).all():
            row[_CHUNKS] = 0  # the program's rule for a caption that equals its reference
    return Metric(("meteor",), counts, corpus_meteor)


def corpus_meteor(counts: Floats) -> Floats:
    """Turn the program's counts [..., 23], or their sums, into METEOR [..., 1]."""
    test_length, reference_length, test_function, reference_function = np.moveaxis(counts[..., :4], -1, 0)
    stages = counts[..., 4:20].reshape(*counts.shape[:-1], 4, 4)  # [..., stage, content and function words of either]
    chunks, test_words, reference_words = np.moveaxis(counts[..., 20:], -1, 0)
    weighted = stages * np.array(STAGES)[:, None] * np.array([DELTA, DELTA, 1 - DELTA, 1 - DELTA])
    test_matches, reference_matches = (weighted[..., side::2].sum((-2, -1)) for side in (0, 1))
    precision = _ratio(test_matches, DELTA * (test_length - test_function) + (1 - DELTA) * test_function)
    recall = _ratio(
        reference_matches, DELTA * (reference_length - reference_function) + (1 - DELTA) * reference_function
    )
    mean = _ratio(precision * recall, (1 - ALPHA) * recall + ALPHA * precision)
    fragmentation = _ratio(chunks, (test_words + reference_words) / 2)
    return np.asarray(mean * (1 - GAMMA * fragmentation**BETA))[..., None]


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator != 0)


def _line(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> str:
    # The program takes the last field that is not empty as the caption, so no field may be empty.
    fields = [*(reference for reference in references if reference), candidate]
    if len(fields) == 1:
        fields = [["."], candidate]
    return " ||| ".join(["SCORE", *(" ".join(field).replace("|||", "| | |") or "." for field in fields)])
