"""Sampling against the exact distribution, computed with the warpers of transformers, and its guarantees."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from itune.runtime.engines.base import Float32
from itune.runtime.errors import SearchError, reason
from itune.runtime.search import SearchConfig
from itune.runtime.search.sampling import uniform
from tests.runtime.fake_engine import Search, TableEngine, TableState, always, log_sum_exp, random_logits

VOCABULARY, END = 14, 13
SAMPLES = 4000
sampling = partial(SearchConfig, num_beams=1, do_sample=True)


def probabilities(logits: Float32, history: tuple[int, ...], config: SearchConfig) -> list[float]:
    """What `generate(do_sample=True)` would draw the next token from."""
    steps = [RepetitionPenaltyLogitsProcessor(config.repetition_penalty), TemperatureLogitsWarper(config.temperature)]
    if config.bad_words:
        steps.insert(1, NoBadWordsLogitsProcessor([list(word) for word in config.bad_words], eos_token_id=END))
    if config.top_k:
        steps.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(TopPLogitsWarper(config.top_p))
    scores = torch.from_numpy(logits.astype(np.float64))[None]
    found: list[float] = LogitsProcessorList(steps)(torch.tensor([history]), scores)[0].softmax(-1).tolist()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 4},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 0, "temperature": 0.4},
        {"top_k": 0, "temperature": 2.5},
        {"top_k": 3, "repetition_penalty": 4.0, "bad_words": ((4,), (9,), (1, 2))},
        {"top_k": 6, "top_p": 0.8, "temperature": 1.7, "repetition_penalty": 1.5, "bad_words": ((6,),)},
    ],
    ids=str,
)
def test_draws_from_the_exact_distribution(search: Search, options: dict[str, Any]) -> None:
    def logits(_image: int, history: tuple[int, ...]) -> Float32:
        return np.random.default_rng([5, *history]).normal(0, 1.5, VOCABULARY).astype(np.float32)

    config = sampling(max_new_tokens=2, num_return=SAMPLES, seed=11, **options)
    [captions] = search(TableEngine(logits), TableState(range(1)), [[2, 4]], config, END)
    counts = Counter(caption.tokens for caption in captions)
    expected: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for first, chance in enumerate(probabilities(logits(0, (2, 4)), (2, 4), config)):
        if first == END:
            expected[()] += SAMPLES * chance
            continue
        for second, then in enumerate(probabilities(logits(0, (2, 4, first)), (2, 4, first), config)):
            expected[(first,) if second == END else (first, second)] += SAMPLES * chance * then
    assert all(expected[tokens] > 0 for tokens in counts)  # nothing that may not be drawn
    assert counts.total() == SAMPLES
    cells: defaultdict[tuple[int, ...] | None, list[float]] = defaultdict(lambda: [0, 0])
    for tokens, mean in expected.items():
        cell = cells[tokens if mean >= 5 else None]  # the rare ones share a cell
        cell[0] += counts[tokens]
        cell[1] += mean
    chi_square = sum((count - mean) ** 2 / mean for count, mean in cells.values() if mean > 0)
    freedom = sum(mean > 0 for _, mean in cells.values()) - 1
    assert freedom >= 4
    assert abs(chi_square - freedom) < 3.5 * (2 * freedom) ** 0.5  # neither off nor suspiciously even


def test_scores_are_the_models_own(search: Search) -> None:
    logits = random_logits(1, VOCABULARY, 9, 0)
    config = sampling(max_new_tokens=5, num_return=20, temperature=3.0, repetition_penalty=1.5, length_penalty=0.5)
    [captions] = search(TableEngine(logits), TableState(range(1)), [[2]], config, END)
    lengths = set()
    for caption in captions:
        written = caption.tokens + (END,) * (len(caption.tokens) < 5)
        rows = [logits(0, (2, *written[:step])) for step in range(len(written))]
        total = sum(float(row[token]) - float(log_sum_exp(row)) for row, token in zip(rows, written, strict=True))
        assert caption.score == pytest.approx(total / len(written) ** 0.5, rel=1e-9)
        lengths.add(len(written))
    assert len(lengths) > 2


def test_samples_depend_on_neither_neighbours_nor_their_number(search: Search) -> None:
    logits = random_logits(7, 30, 40, 0)
    prompts = [[1], [2, 3, 4], [5, 6], [1]]
    config = sampling(max_new_tokens=8, num_return=4, top_k=10, no_repeat_ngram_size=2, seed=3)
    together = search(TableEngine(logits), TableState(range(4)), prompts, config, 0)
    fewer = sampling(max_new_tokens=8, num_return=2, top_k=10, no_repeat_ngram_size=2, seed=3)
    for image, prompt in enumerate(prompts):
        [alone] = search(TableEngine(logits), TableState([image]), [prompt], fewer, 0)
        assert together[image][:2] == alone
    assert len({caption.tokens for caption in together[0]}) > 1
    assert together == search(TableEngine(logits), TableState(range(4)), prompts, config, 0)
    other = sampling(max_new_tokens=8, num_return=4, top_k=10, no_repeat_ngram_size=2, seed=4)
    assert together != search(TableEngine(logits), TableState(range(4)), prompts, other, 0)


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 0, "top_p": 1e-9}, {"temperature": 1e-9}], ids=str)
def test_the_likeliest_token_alone_is_greedy_search(search: Search, options: dict[str, Any]) -> None:
    logits = random_logits(4, 30, 1000, 0)
    greedy = SearchConfig(num_beams=1, max_new_tokens=9, no_repeat_ngram_size=2)
    expected = search(TableEngine(logits), TableState(range(3)), [[1], [2], [3]], greedy, 0)
    config = sampling(max_new_tokens=9, no_repeat_ngram_size=2, **options)
    assert search(TableEngine(logits), TableState(range(3)), [[1], [2], [3]], config, 0) == expected


@pytest.mark.parametrize(
    ("options", "asked"),
    [({}, 50), ({"top_k": 7}, 7), ({"top_k": 7, "repetition_penalty": 1.5}, 9), ({"top_k": 0}, 90)],
)
def test_asks_for_the_candidates_it_needs(search: Search, options: dict[str, Any], asked: int) -> None:
    engine = TableEngine(always(np.linspace(9, 0, 90, dtype=np.float32)))
    search(engine, TableState(range(1)), [[9, 8]], sampling(max_new_tokens=1, **options), 89)
    assert engine.k_per_step == [asked]


def test_samples_end_at_different_steps(search: Search) -> None:
    logits = np.zeros(4, np.float32)
    engine = TableEngine(always(logits))
    config = sampling(max_new_tokens=30, num_return=3, top_k=0, seed=1)
    [captions, *_] = search(engine, TableState(range(2)), [[1], [2]], config, 0)
    lengths = [len(caption.tokens) for caption in captions]
    assert len(set(lengths)) > 1
    assert len(engine.rows_per_step) == max(lengths) + 1
    assert engine.rows_per_step[:2] == [2, 6]


def test_samples_without_a_possible_token_are_left_out(search: Search) -> None:
    config = sampling(max_new_tokens=4, min_new_tokens=4, num_return=8, no_repeat_ngram_size=1, top_k=0)
    with pytest.raises(SearchError) as error:
        search(TableEngine(always(np.zeros(4, np.float32))), TableState(range(1)), [[1]], config, 0)
    assert "image 0" in str(error.value)

    def logits(_image: int, history: tuple[int, ...]) -> Float32:  # 3 leads nowhere
        return np.full(5, -np.inf if history[-1] == 3 else 0, np.float32)

    config = sampling(max_new_tokens=2, min_new_tokens=2, num_return=40, top_k=0)
    [captions] = search(TableEngine(logits), TableState(range(1)), [[1]], config, 0)
    assert 20 < len(captions) < 40
    assert all(caption.tokens[0] != 3 for caption in captions)


def test_random_numbers_are_even() -> None:
    numbers = np.array([[uniform(seed, sample, step) for sample in range(40) for step in range(40)] for seed in (0, 1)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    for each in numbers:
        counts = np.histogram(each, bins=20, range=(0, 1))[0]
        assert ((counts - 80) ** 2 / 80).sum() < 45  # chi-square of 19 degrees of freedom: 1 in 1,000
        assert len(set(each)) == 1600
    assert abs(np.corrcoef(numbers)[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ({"num_beams": 5}, "num_beams", 5),
        ({"temperature": 0.0}, "temperature", 0.0),
        ({"temperature": np.nan}, "temperature", np.nan),
        ({"top_k": -1}, "top_k", -1),
        ({"top_p": 0.0}, "top_p", 0.0),
        ({"top_p": 1.5}, "top_p", 1.5),
        ({"seed": -1}, "seed", -1),
        ({"seed": 2**64}, "seed", 2**64),
        ({"do_sample": False, "temperature": 0.5}, "temperature", "do_sample"),
        ({"do_sample": False, "seed": 7}, "seed", "do_sample"),
        ({"do_sample": False, "num_return": 2}, "num_return", 2),
    ],
    ids=str,
)
def test_refuses_a_bad_option_by_name(options: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        sampling(**options)
    assert field in reason(error.value)
    assert str(value) in reason(error.value)


@pytest.mark.parametrize("field", ["temperature", "top_p", "length_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_as_such(field: str, value: float) -> None:
    with pytest.raises(ValidationError) as error:
        sampling(**{field: value})
    assert [(each["loc"], each["type"]) for each in error.value.errors()] == [((field,), "finite_number")]
