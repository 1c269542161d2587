"""The search against a plain reference, on fake decoders full of ties, -inf and tiny vocabularies."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from itune.runtime.engines.base import Candidates, Float32
from itune.runtime.errors import SearchError, reason
from itune.runtime.search import Hypothesis, SearchConfig
from tests.runtime.fake_engine import Logits, Search, TableEngine, TableState, always, log_sum_exp, random_logits


def processed(scores: list[float], history: tuple[int, ...], new: int, config: SearchConfig, end: int) -> list[float]:
    """The logits processors of transformers on the scores of a whole vocabulary."""
    scores = list(scores)
    for token in set(history):
        penalty = config.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    size = config.no_repeat_ngram_size
    seen = {history[i : i + size] for i in range(len(history) - size + 1)} if size else set()
    words = [word for word in config.bad_words if word != (end,)]
    for token in range(len(scores)):
        longer = (*history, token)
        if (size and longer[-size:] in seen) or any(longer[-len(word) :] == word for word in words):
            scores[token] = -math.inf
    if new < config.min_new_tokens:
        scores[end] = -math.inf
    return scores


def reference(
    logits: Callable[[tuple[int, ...]], Float32], prompt: tuple[int, ...], config: SearchConfig, end: int
) -> list[Hypothesis]:
    """Greedy and beam search on one image, every token of the vocabulary considered."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    greedy = config.num_beams == 1
    for length in range(1, config.max_new_tokens + 1):
        options = []
        for beam, (score, tokens) in enumerate(beams):
            raw = logits(prompt + tokens)
            total = float(log_sum_exp(raw))
            if total == -math.inf:
                continue
            log_probs = [float(logit) - total for logit in raw]
            before = [float(logit) for logit in raw] if greedy else log_probs
            after = processed(before, prompt + tokens, length - 1, config, end)
            for token, value in enumerate(after):
                if value > -math.inf:
                    rank = value if greedy else score + value
                    options.append((-rank, beam, token, score + (log_probs[token] if greedy else value)))
        going_on = []
        for place, (_, beam, token, score) in enumerate(sorted(options)[: 1 if greedy else 2 * config.num_beams]):
            tokens = beams[beam][1]
            if token != end and length < config.max_new_tokens:
                going_on.append((score, (*tokens, token)))
            elif place < config.num_beams:
                tokens = tokens if token == end else (*tokens, token)
                finished.append(Hypothesis(tokens, score / float(length) ** config.length_penalty))
        beams = going_on[: config.num_beams]
        finished = sorted(finished, key=lambda hypothesis: -hypothesis.score)[: config.num_beams]
        if not beams:
            break
        favours_long = config.early_stopping == "never" and config.length_penalty > 0
        reachable = beams[0][0] / float(config.max_new_tokens if favours_long else length) ** config.length_penalty
        full = len(finished) == config.num_beams
        if full and (config.early_stopping is True or reachable <= finished[-1].score):
            break
    return finished[: config.num_return]


@st.composite
def searches(draw: st.DrawFn) -> tuple[Logits, list[list[int]], SearchConfig, int]:
    vocabulary = draw(st.integers(2, 24))
    token = st.integers(0, vocabulary - 1)
    num_beams = draw(st.integers(1, 8))
    max_new_tokens = draw(st.integers(1, 6))
    processors = {
        "no_repeat_ngram_size": draw(st.integers(1, 3)),
        "repetition_penalty": draw(st.sampled_from([1.25, 2.0])),
        "bad_words": tuple(draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))),
        "min_new_tokens": draw(st.integers(1, max_new_tokens)),
    }
    names = sorted(processors)
    chosen = draw(st.just(set()) | st.sampled_from([{name} for name in names]) | st.sets(st.sampled_from(names)))
    config = SearchConfig(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        num_return=draw(st.none() | st.integers(1, num_beams)),
        **{name: value for name, value in processors.items() if name in chosen},
    )
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=5))
    impossible = draw(st.sampled_from([0.0, 0.0, 0.3, 0.8]))
    logits = random_logits(draw(st.integers(0, 2**32)), vocabulary, draw(st.integers(1, 12)), impossible)
    return logits, prompts, config, draw(token)


def check_against_reference(
    search: Search, logits: Logits, prompts: list[list[int]], config: SearchConfig, end: int
) -> None:
    expected = [reference(partial(logits, image), tuple(prompt), config, end) for image, prompt in enumerate(prompts)]
    state = TableState(range(len(prompts)))
    if all(expected):
        assert search(TableEngine(logits), state, prompts, config, end) == expected
    else:
        with pytest.raises(SearchError) as error:
            search(TableEngine(logits), state, prompts, config, end)
        assert f"image {expected.index([])}" in str(error.value)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(searches())
def test_equals_the_reference(search: Search, case: tuple[Logits, list[list[int]], SearchConfig, int]) -> None:
    check_against_reference(search, *case)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_equal_logits_go_to_the_lower_token(search: Search, num_beams: int) -> None:
    config = SearchConfig(num_beams=num_beams, max_new_tokens=2)
    captions = search(TableEngine(always(np.zeros(40, np.float32))), TableState(range(1)), [[7]], config, 39)
    assert [caption.tokens for caption in captions[0]] == [(0, token) for token in range(num_beams)]


def test_a_tie_made_by_a_penalty_goes_to_the_lower_token(search: Search) -> None:
    logits = np.zeros(20, np.float32)
    logits[[3, 8]] = 1, 2
    config = SearchConfig(num_beams=1, max_new_tokens=1, repetition_penalty=2.0)
    [[caption]] = search(TableEngine(always(logits)), TableState(range(1)), [[8]], config, 19)
    assert caption.tokens == (3,)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_end_token_at_step_one(search: Search, num_beams: int) -> None:
    logits = np.full(20, -20, np.float32)
    logits[4] = 0
    config = SearchConfig(num_beams=num_beams, num_return=1)
    [[caption]] = search(TableEngine(always(logits)), TableState(range(1)), [[1]], config, 4)
    assert caption.tokens == ()
    assert caption.score == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_early_stopping(search: Search, length_penalty: float) -> None:
    steps = {True: 0, False: 0, "never": 0}
    for seed in range(20):
        logits = random_logits(seed, vocabulary=9, levels=4, impossible=0)
        for early_stopping in (True, False, "never"):
            config = SearchConfig(
                num_beams=2, max_new_tokens=12, length_penalty=length_penalty, early_stopping=early_stopping
            )
            engine = TableEngine(logits)
            found = search(engine, TableState(range(1)), [[1]], config, 0)
            assert found == [reference(partial(logits, 0), (1,), config, 0)]
            steps[early_stopping] += len(engine.k_per_step)
    assert steps[True] < steps[False]
    # Only where length is rewarded can a longer caption still overtake the finished ones.
    assert steps[False] < steps["never"] if length_penalty > 0 else steps[False] == steps["never"]


def test_finished_images_leave_the_batch(search: Search) -> None:
    def logits(image: int, history: tuple[int, ...]) -> Float32:
        values = np.linspace(0, -3, 30, dtype=np.float32)
        values[29] = 30 if len(history) == (1, 4, 2)[image] else -30  # the end token, after so many fed tokens
        return values

    engine = TableEngine(logits)
    config = SearchConfig(num_beams=2, max_new_tokens=9, early_stopping=True, num_return=1)
    captions = search(engine, TableState(range(3)), [[5], [5], [5]], config, 29)
    assert [len(caption.tokens) for [caption] in captions] == [0, 3, 1]
    # Two beams end in every image's own step; the second one of image 0 can only end at the step after.
    assert engine.rows_per_step[:2] == [3, 6]
    assert sorted(engine.rows_per_step[1:], reverse=True) == engine.rows_per_step[1:]
    assert engine.rows_per_step[-1] == 2


def test_result_does_not_depend_on_the_neighbours(search: Search) -> None:
    logits = random_logits(3, vocabulary=30, levels=40, impossible=0)
    prompts = [[1], [2, 3, 4], [5, 6], [1]]
    config = SearchConfig(num_beams=4, max_new_tokens=8, no_repeat_ngram_size=2, repetition_penalty=1.3)
    together = search(TableEngine(logits), TableState(range(4)), prompts, config, 0)
    alone = [
        search(TableEngine(logits), TableState([image]), [prompt], config, 0)[0] for image, prompt in enumerate(prompts)
    ]
    assert together == alone
    assert together[0] != together[3]


@pytest.mark.parametrize(
    ("options", "pushed_down"),
    [
        ({}, [0, 0, 0]),
        ({"repetition_penalty": 1.5}, [2, 3, 4]),  # every token so far
        ({"no_repeat_ngram_size": 1}, [2, 3, 4]),
        ({"no_repeat_ngram_size": 4}, [0, 0, 0]),
        ({"min_new_tokens": 2}, [1, 1, 0]),
        ({"bad_words": ((3,), (4,), (5, 6), (99,))}, [2, 2, 2]),  # of these, 99 is the end token
        ({"bad_words": ((8, 6), (8, 7))}, [2, 0, 0]),  # only after the prompt's last token
    ],
)
def test_asks_for_no_more_candidates_than_needed(
    search: Search, options: dict[str, Any], pushed_down: list[int]
) -> None:
    logits = np.linspace(9, 0, 100, dtype=np.float32)
    engine = TableEngine(always(logits))
    search(engine, TableState(range(1)), [[9, 8]], SearchConfig(num_beams=3, max_new_tokens=3, **options), 99)
    assert engine.k_per_step == [6 + pushed for pushed in pushed_down]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("step", [1, 3])
def test_refuses_logits_that_are_not_numbers(search: Search, bad: float, num_beams: int, step: int) -> None:
    def logits(image: int, history: tuple[int, ...]) -> Float32:
        values = np.linspace(1, 0, 20, dtype=np.float32)
        values[7] = bad if len(history) == step else 0
        return values

    with pytest.raises(SearchError) as error:
        search(TableEngine(logits), TableState(range(2)), [[1], [2]], SearchConfig(num_beams=num_beams), 19)
    assert "NaN" in str(error.value)


def test_fewer_possible_tokens_than_beams(search: Search) -> None:
    logits = np.full(50, -np.inf, np.float32)
    logits[[3, 8, 9]] = 0.0, 1.0, 2.0
    config = SearchConfig(num_beams=8, max_new_tokens=1)
    [captions] = search(TableEngine(always(logits)), TableState(range(1)), [[1]], config, 49)
    assert [caption.tokens for caption in captions] == [(9,), (8,), (3,)]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_no_caption_is_possible(search: Search, num_beams: int) -> None:
    engine = TableEngine(always(np.zeros(3, np.float32)))
    config = SearchConfig(num_beams=num_beams, max_new_tokens=9, min_new_tokens=9, no_repeat_ngram_size=1)
    with pytest.raises(SearchError) as error:
        search(engine, TableState(range(2)), [[0], [0]], config, 2)
    assert "image 0" in str(error.value)
    assert len(engine.rows_per_step) == 2  # token 1, then nothing


def test_no_images(search: Search) -> None:
    assert search(TableEngine(random_logits(0, 9, 9, 0)), TableState(range(0)), [], SearchConfig(), 1) == []


@pytest.mark.parametrize("spoil", [lambda a: a[:, :-1], lambda a: np.concatenate([a, a]), lambda a: a.T])
@pytest.mark.parametrize("field", range(3))
def test_refuses_candidates_that_are_misshapen(search: Search, spoil: Callable[[Any], Any], field: int) -> None:
    class Misshapen(TableEngine):
        def step(self, *arguments: Any, **options: Any) -> Candidates:
            arrays = list(super().step(*arguments, **options))
            arrays[field] = spoil(arrays[field].reshape(len(arrays[0]), -1))
            return Candidates(*arrays)

    engine = Misshapen(random_logits(0, 30, 9, 0))
    with pytest.raises(SearchError) as error:
        search(engine, TableState(range(2)), [[1], [2]], SearchConfig(num_beams=3), 1)
    assert "6 candidates in each of 2 rows" in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", 0),
        ("num_beams", 2.5),
        ("max_new_tokens", 0),
        ("max_new_tokens", "twelve"),
        ("min_new_tokens", -1),
        ("min_new_tokens", 33),
        ("length_penalty", math.inf),
        ("length_penalty", 1000.0),
        ("length_penalty", -1000.0),
        ("early_stopping", "always"),
        ("no_repeat_ngram_size", -2),
        ("repetition_penalty", 0.9),
        ("repetition_penalty", math.nan),
        ("bad_words", ((1, 2), ())),
        ("bad_words", ((1, -2),)),
        ("num_return", 0),
        ("num_return", 6),
    ],
)
def test_refuses_a_bad_option_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        SearchConfig(**{field: value})
    assert reason(error.value).startswith(field)
