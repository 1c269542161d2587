"""Intervals and significance tests against closed forms, naive loops over whole evaluations, and simulated chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.metrics import compare_groups, evaluate
from itune.metrics.bleu import bleu
from itune.metrics.meteor import corpus_meteor
from itune.metrics.rouge import common_length, rouge_l
from itune.metrics.statistics import Metric, bootstrap, compare, holm, interval, mean_metric

WORDS = ["a", "dog", "cat", "runs", "on", "red", "grass"]
sentence = st.lists(st.sampled_from(WORDS), max_size=9)


def naive_lcs(first: list[str], second: list[str]) -> int:
    return max(
        len(chosen)
        for size in range(len(first) + 1)
        for chosen in itertools.combinations(first, size)
        if is_subsequence(list(chosen), second)
    )


def is_subsequence(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


@settings(deadline=None, max_examples=60)
@given(sentence, sentence)
def test_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    assert common_length(first, second) == naive_lcs(first, second)


def test_rouge_by_hand() -> None:
    # Longest common subsequences 4 of 5 and 4 words ("this is a test"), 4 and 5: precision 4/5, recall 4/4.
    references = [["this", "is", "a", "test"], ["this", "is", "also", "a", "test"]]
    assert rouge_l(["this", "is", "a", "good", "test"], references) == pytest.approx(2.44 * 0.8 / (1 + 1.44 * 0.8))
    assert rouge_l(["this", "is", "a", "good", "test"], references) == pytest.approx(0.9070631, abs=1e-7)
    assert rouge_l([], references) == rouge_l(["x"], references) == rouge_l(["x"], [[]]) == 0
    assert rouge_l([], [[]]) == 1  # as the COCO code has it


def some_captions(seed: int, images: int, noise: float) -> dict[str, str]:
    """Captions that agree with those of noise 0, except for words drawn at random."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    texts = {}
    for i in range(images):
        text = [WORDS[w] for w in base.integers(0, 7, 8)]
        texts[str(i)] = " ".join(WORDS[own.integers(7)] if own.random() < noise else word for word in text)
    return texts


def test_a_bootstrap_sample_is_an_evaluation_of_repeated_images() -> None:
    captions, truth = some_captions(1, 20, 0.5), some_captions(2, 20, 0.2)
    found = evaluate(captions, {k: [v] for k, v in truth.items()}, java=False)
    drawn = np.random.default_rng(5).integers(0, 20, 20)
    pairs = [(captions[str(i)].split(), [truth[str(i)].split()]) for i in drawn]
    sampled = np.concatenate([metric.select(drawn.tolist()).scores() for metric in found.metrics])
    per_image = found.per_image()
    assert sampled[0] == pytest.approx(np.mean(per_image["cider"][drawn])), "its document frequencies stay"
    assert sampled[1:5] == pytest.approx(bleu(pairs).scores())
    assert sampled[5] == pytest.approx(np.mean([rouge_l(*pair) for pair in pairs]))


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = interval(bootstrap([mean_metric("x", values.tolist())], samples=4000))[0]
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_intervals_cover() -> None:
    """Of 300 samples from a population, about 95 % of the intervals hold its mean (a few less: percentile, n = 60)."""
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(300):
        metric = mean_metric("x", rng.exponential(1, 60).tolist())
        low, high = interval(bootstrap([metric], samples=400, seed=seed))[0]
        inside += low <= 1 <= high
    assert 0.89 <= inside / 300 <= 0.98


def test_metrics_see_the_same_samples_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = mean_metric("x", [1.0, 2.0, 5.0])
    double = Metric(("y", "z"), metric.statistics, lambda sums: sums * 2.0)
    drawn = bootstrap([metric, double], samples=50)
    assert drawn.shape == (50, 3)
    assert drawn[:, 0] == pytest.approx(drawn[:, 1] / 6)
    assert (drawn[:, 2] == 6).all(), "every set has as many images as there are"
    monkeypatch.setattr("itune.metrics.statistics._CHUNK", 30)
    assert bootstrap([metric, double], samples=50).shape == (50, 3)


def test_randomisation_counts_the_exchanges_that_are_as_extreme() -> None:
    first, second = [1.0, 2.0, 3.0, 4.0], [1.5, 2.5, 3.25, 4.5]
    signs = itertools.product([-1, 1], repeat=4)
    gaps = np.subtract(second, first)
    exact = np.mean([abs(np.dot(sign, gaps)) >= gaps.sum() - 1e-12 for sign in signs])
    found = compare([mean_metric("x", first)], [mean_metric("x", second)], permutations=20_000)["x"]
    assert found.difference == pytest.approx(gaps.mean())
    assert found.p == pytest.approx(exact, abs=0.01)


def test_randomisation_of_bleu_is_that_of_whole_corpora() -> None:
    """BLEU is no mean: each exchange has to score two new corpora."""
    truth = {k: [v] for k, v in some_captions(9, 8, 0.1).items()}
    one, two = some_captions(1, 8, 0.3), some_captions(2, 8, 0.6)
    found = compare(
        *(evaluate(captions, truth, java=False).metrics for captions in (one, two)), permutations=4000, samples=10
    )["bleu2"]
    extreme, total = 0, 0
    for swaps in itertools.product([False, True], repeat=8):
        a = {k: two[k] if swap else one[k] for k, swap in zip(one, swaps, strict=True)}
        b = {k: one[k] if swap else two[k] for k, swap in zip(one, swaps, strict=True)}
        scores = [bleu((c[k].split(), [truth[k][0].split()]) for k in c).scores()[1] for c in (a, b)]
        extreme, total = extreme + (abs(scores[1] - scores[0]) >= abs(found.difference) - 1e-12), total + 1
    assert found.p == pytest.approx(extreme / total, abs=0.03)


def test_equal_captioners_do_not_differ() -> None:
    captions = some_captions(1, 30, 0.4)
    truth = {k: [v] for k, v in some_captions(9, 30, 0.1).items()}
    same = {"all": evaluate(captions, truth, java=False)}
    for found in compare_groups(same, same)["all"].values():
        assert (found.difference, found.low, found.high, found.p, found.significant) == (0, 0, 0, 1, False)


def test_noise_is_hardly_ever_called_a_difference() -> None:
    """Two captioners that are wrong as often: of 40 pairs, any of six scores may differ in about 2."""
    truth = {k: [v] for k, v in some_captions(0, 40, 0.0).items()}
    false_alarms = 0
    for seed in range(40):
        sides = [{"all": evaluate(some_captions(100 + 2 * seed + s, 40, 0.4), truth, java=False)} for s in (0, 1)]
        false_alarms += any(found.significant for found in compare_groups(*sides)["all"].values())
    assert false_alarms <= 6  # binomial(40, 0.05): more in 1 of 300 runs; the seeds are fixed


def test_a_real_difference_is_found() -> None:
    truth = {k: [v] for k, v in some_captions(0, 150, 0.0).items()}
    sides = [
        {"all": evaluate(some_captions(seed, 150, noise), truth, java=False)} for seed, noise in [(1, 0.5), (2, 0.2)]
    ]
    for found in compare_groups(*sides)["all"].values():
        assert found.significant
        assert 0 < found.low < found.difference < found.high
        assert found.p <= found.p_holm < 0.05


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_domain_is_a_set_of_its_own() -> None:
    captions, truth = some_captions(1, 20, 0.5), some_captions(2, 20, 0.2)
    whole = evaluate(captions, {k: [v] for k, v in truth.items()}, java=False)
    some = [str(i) for i in range(5, 12)]
    alone = evaluate({k: captions[k] for k in some}, {k: [truth[k]] for k in some}, java=False)
    assert whole.select(some).scores() == pytest.approx(alone.scores())
    assert whole.select(some).images == tuple(some)


def test_meteor_of_the_published_counts() -> None:
    """What the authors' program counts for 'this is a good test' and 'this is a test'; the rest needs no Java."""
    counts = np.array([5, 4, 3, 3, 1, 1, 3, 3, *[0] * 12, 2, 4, 4], float)
    assert corpus_meteor(counts) == pytest.approx([0.4443438716486749], abs=1e-15)
    assert corpus_meteor(np.zeros(23)) == pytest.approx([0])
