"""CIDEr-D and BLEU: published figures, figures computed by hand, and a second, naive implementation."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.metrics import CiderD, evaluate
from itune.runtime.errors import ItuneError

caption = st.lists(st.sampled_from(["a", "dog", "cat", "runs", "on", "red", "grass"]), min_size=1, max_size=9).map(
    " ".join
)
corpus = st.dictionaries(
    st.integers(0, 99).map(str), st.tuples(caption, st.lists(caption, min_size=1, max_size=3)), min_size=1, max_size=6
)
Corpus = dict[str, tuple[str, list[str]]]


def score(candidates: dict[str, str], references: dict[str, list[str]], tokenized: bool = False) -> dict[str, float]:
    options: dict[str, Any] = {"split": str.split} if tokenized else {}
    return evaluate(candidates, references, java=False, **options).scores()


def bleu(scores: dict[str, float]) -> list[float]:
    return [scores[f"bleu{order}"] for order in (1, 2, 3, 4)]


def split(corpus: Corpus) -> tuple[dict[str, str], dict[str, list[str]]]:
    return {k: candidate for k, (candidate, _) in corpus.items()}, {k: refs for k, (_, refs) in corpus.items()}


def occurrences(sentence: str, ngram: list[str]) -> int:
    words = sentence.split()
    return sum(words[i : i + len(ngram)] == ngram for i in range(len(words) - len(ngram) + 1))


def ngrams(sentence: str, order: int) -> list[list[str]]:
    words = sentence.split()
    return [words[i : i + order] for i in range(len(words) - order + 1)]


def naive_cider(candidates: dict[str, str], references: dict[str, list[str]]) -> float:
    """Dense tf-idf vectors over every n-gram of the corpus, straight from the paper."""
    scores = []
    for image, candidate in candidates.items():
        total = 0.0
        for order in (1, 2, 3, 4):
            sentences = [*candidates.values(), *(r for refs in references.values() for r in refs)]
            vocabulary = [list(g) for g in {tuple(g) for s in sentences for g in ngrams(s, order)}]
            df = [sum(any(occurrences(r, g) for r in refs) for refs in references.values()) for g in vocabulary]
            idf = np.log(len(references) / np.maximum(df, 1))
            c = idf * [occurrences(candidate, g) for g in vocabulary]
            for reference in references[image]:
                r = idf * [occurrences(reference, g) for g in vocabulary]
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                delta = len(candidate.split()) - len(reference.split())
                if norm > 0:
                    total += np.minimum(c, r) @ r / norm * math.exp(-(delta**2) / 72) / len(references[image])
        scores.append(10 * total / 4)
    return float(np.mean(scores))


def naive_bleu(candidates: dict[str, str], references: dict[str, list[str]]) -> list[float]:
    """Geometric mean of the clipped precisions, times the brevity penalty; without the COCO code's constants."""
    precisions = []
    for order in (1, 2, 3, 4):
        matched = sum(
            min(occurrences(candidate, list(g)), max(occurrences(r, list(g)) for r in references[image]))
            for image, candidate in candidates.items()
            for g in {tuple(g) for g in ngrams(candidate, order)}
        )
        guessed = sum(len(ngrams(candidate, order)) for candidate in candidates.values())
        precisions.append(matched / guessed if guessed else 1e-15 / 1e-9)
    length = sum(len(candidate.split()) for candidate in candidates.values())
    closest = 0
    for image, candidate in candidates.items():
        lengths = sorted(len(r.split()) for r in references[image])
        closest += min(lengths, key=lambda n: abs(n - len(candidate.split())))
    penalty = min(1.0, math.exp(1 - closest / length))
    return [penalty * math.prod(precisions[:order]) ** (1 / order) for order in (1, 2, 3, 4)]


def test_published_scores(shared_data: Path) -> None:
    folder = shared_data / "metric_tieout"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    hypotheses, first, second = (
        (folder / name).read_text(encoding="utf-8").splitlines() for name in ("hyp.txt", "ref1.txt", "ref2.txt")
    )
    candidates = {str(i): line for i, line in enumerate(hypotheses)}
    references = {str(i): list(pair) for i, pair in enumerate(zip(first, second, strict=True))}
    scores = score(candidates, references, tokenized=True)
    assert bleu(scores) == pytest.approx([0.550000, 0.428174, 0.284043, 0.201143], abs=1e-6)
    assert scores["cider"] == pytest.approx(1.242192, abs=1e-6)


def test_published_scores_of_one_sentence() -> None:
    scores = score({"1": "this is a good test"}, {"1": ["this is a test", "this is also a test"]}, tokenized=True)
    assert bleu(scores) == pytest.approx([0.799999, 0.632455, 0.5108729, 0.0000903602], abs=1e-6, rel=1e-5)
    assert scores["cider"] == 0, "with one image every n-gram is in every document"


def test_cider_by_hand() -> None:
    references = [["red dog"], ["blue cat"], ["green bird"], ["old tall man"]]
    candidates = ["red dog", "black cat", "green bird green bird", ""]
    cider = CiderD([list(map(str.split, captions)) for captions in references])
    # Every n-gram occurs in one image, so idf is log 4 throughout and cancels in the cosines.
    assert cider.per_image(list(map(str.split, candidates))) == pytest.approx(
        [
            10 / 4 * (1 + 1),  # no 3- and 4-grams
            10 / 4 * (1 / 2),
            # Clipped: (1 + 1) / (sqrt(4 + 4) sqrt(2)), 1 / sqrt(4 + 1); two words longer than the reference.
            10 / 4 * (1 / 2 + 1 / math.sqrt(5)) * math.exp(-(2**2) / (2 * 6**2)),
            0,
        ]
    )


def test_bleu_by_hand() -> None:
    # 3 of 4 words and 1 of 3 pairs match; "the" counts twice at most; 5 reference words (closest) to 4.
    scores = score({"x": "the the the cat"}, {"x": ["the cat on the mat", "a cat sat on the mat again today"]})
    assert bleu(scores)[:2] == pytest.approx([math.exp(-1 / 4) * 3 / 4, math.exp(-1 / 4) * math.sqrt(3 / 4 * 1 / 3)])


@settings(deadline=None)
@given(corpus)
def test_agrees_with_the_naive_implementation(corpus: Corpus) -> None:
    candidates, references = split(corpus)
    scores = score(candidates, references, tokenized=True)
    assert scores["cider"] == pytest.approx(naive_cider(candidates, references), abs=1e-9)
    # The naive figure has no TINY: where nothing matches, BLEU is (1e-15 / n-grams) to the power of 1/4 at most.
    assert bleu(scores) == pytest.approx(naive_bleu(candidates, references), abs=1e-3)


@settings(deadline=None)
@given(corpus, st.randoms(use_true_random=False))
def test_order_does_not_matter(corpus: Corpus, random: object) -> None:
    candidates, references = split(corpus)
    shuffled = sorted(corpus, key=lambda _: random.random())  # type: ignore[attr-defined]
    before = evaluate(candidates, references, java=False)
    after = evaluate(
        {k: candidates[k] for k in shuffled}, {k: references[k][::-1] for k in reversed(shuffled)}, java=False
    )
    assert bleu(after.scores()) == bleu(before.scores())
    cider = (dict(zip(each.images, each.per_image()["cider"], strict=True)) for each in (before, after))
    assert next(cider) == pytest.approx(next(cider))


@settings(deadline=None)
@given(corpus)
def test_bounds(corpus: Corpus) -> None:
    found = evaluate(*split(corpus), java=False)
    cider = found.per_image()["cider"]
    assert cider.shape == (len(corpus),)
    assert ((cider >= 0) & (cider <= 10 + 1e-9)).all()
    assert all(0 <= value <= 1 for value in bleu(found.scores()))


def test_perfect_captions() -> None:
    captions = {
        "a": "A man rides a brown horse.",
        "b": "Two dogs play in the snow.",
        "c": "a child climbs up the stairs",
    }
    scores = score(captions, {image: [text.upper(), text] for image, text in captions.items()})
    assert scores["cider"] == pytest.approx(10)
    assert bleu(scores) == pytest.approx([1, 1, 1, 1])


def test_nothing_said() -> None:
    scores = score({"a": "", "b": "..."}, {"a": ["a dog"], "b": ["a cat"]})
    assert scores["cider"] == 0
    assert bleu(scores) == [0, 0, 0, 0]


def test_text_is_tokenized_unless_it_is_already() -> None:
    references = {"a": ["It's a dog."], "b": ["It's a cat."]}
    assert score({"a": "it 's a dog", "b": "it 's a cat"}, references)["bleu1"] == pytest.approx(1)
    assert score({"a": "it 's a dog", "b": "it 's a cat"}, references, tokenized=True)["bleu1"] == pytest.approx(1 / 4)


def test_only_the_references_of_captioned_images_count() -> None:
    references = {"a": ["a red dog"], "b": ["a blue cat"], "c": ["a red bus"]}
    candidates = {"a": "a red dog", "b": "a red cat"}
    assert score(candidates, references) == score(candidates, {"a": ["a red dog"], "b": ["a blue cat"]})


def test_one_object_scores_again_and_again() -> None:
    references = {"a": ["a red dog"], "b": ["a blue cat"]}
    cider = CiderD([[caption.split() for caption in captions] for captions in references.values()])
    for candidates in ({"a": "a red dog", "b": "a cat"}, {"a": "a blue cat", "b": "a dog"}):
        expected = score(candidates, references)["cider"]
        assert cider.score([caption.split() for caption in candidates.values()]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("candidates", "references", "values"),
    [
        ({"a": "x", "c": "y", "b": "z"}, {"a": ["x"]}, ["2 of 3", "'b'"]),
        ({}, {"a": ["x"]}, ["0 of 0"]),
        ({"a": "x"}, {"a": []}, ["'a'"]),
        ({"a": "x"}, {"a": "a bare string"}, ["'a'"]),
    ],
)
def test_errors_name_the_image(candidates: dict[str, str], references: dict[str, list[str]], values: list[str]) -> None:
    with pytest.raises(ItuneError) as error:
        score(candidates, references)
    assert all(value in str(error.value) for value in values)


def test_references_without_letters_count_as_in_the_coco_code() -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    coco_bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    candidates = {"1": "a dog runs on grass", "2": "a red cat", "3": "on grass", "4": "a cat", "5": ""}
    references = {
        "1": ["a dog runs on the grass", ""],
        "2": ["a red cat", "one cat"],
        "3": [""],
        "4": ["a dog", "", ""],
        "5": ["", "a dog"],
    }
    expected = {}
    lines = {image: [caption] for image, caption in candidates.items()}
    expected["cider"] = cider.Cider().compute_score(references, lines)[0]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints lengths
        bleus = coco_bleu.Bleu(4).compute_score(references, lines)[0]
    expected |= {f"bleu{order}": value for order, value in enumerate(bleus, 1)}
    expected["rouge_l"] = rouge.Rouge().compute_score(references, lines)[0]
    written = {image: [text or "." for text in texts] for image, texts in references.items()}
    candidates = {image: text or "." for image, text in candidates.items()}
    assert score(candidates, written) == pytest.approx(expected, rel=1e-9)
