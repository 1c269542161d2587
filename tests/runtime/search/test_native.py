"""The core in C++ against its NumPy twin: the same bits, step by step, on whatever candidates come."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from itune.runtime.engines.base import Candidates, Float32
from itune.runtime.errors import SearchError
from itune.runtime.search import NATIVE, SearchConfig
from itune.runtime.search.core import Core, MakeCore, native_search, top_k
from itune.runtime.search.numpy_search import NumpySearch
from itune.runtime.search.numpy_top_k import numpy_top_k
from itune.runtime.search.processors import NO_TOKEN

pytestmark = pytest.mark.skipif(not NATIVE, reason="itune was built without a compiler")


@st.composite
def configs(draw: st.DrawFn, vocabulary: int) -> SearchConfig:
    """Beams from 1 to 16 or sampling; every processor and warper alone, or any of them together."""
    token = st.integers(0, vocabulary - 1)
    max_new_tokens = draw(st.integers(1, 8))
    processors: dict[str, Any] = {
        "no_repeat_ngram_size": draw(st.integers(1, 4)),
        "repetition_penalty": draw(st.floats(1.01, 3)),
        "bad_words": tuple(draw(st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5))),
        "min_new_tokens": draw(st.integers(1, max_new_tokens)),
    }
    do_sample = draw(st.booleans())
    if do_sample:
        processors |= {
            "temperature": draw(st.floats(0.2, 3)),
            "top_k": draw(st.integers(0, vocabulary + 1)),
            "top_p": draw(st.floats(0.05, 1)),
        }
    names = sorted(processors)
    chosen = draw(st.just(set()) | st.sampled_from([{name} for name in names]) | st.sets(st.sampled_from(names)))
    return SearchConfig(
        num_beams=1 if do_sample else draw(st.integers(1, 16)),
        max_new_tokens=max_new_tokens,
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.6, 1.0, 2.0])),
        early_stopping=draw(st.sampled_from([True, False, "never"])),
        do_sample=do_sample,
        num_return=draw(st.integers(1, 6)) if do_sample else None,
        seed=draw(st.integers(0, 2**64 - 1)) if do_sample else 0,
        **{name: value for name, value in processors.items() if name in chosen},
    )


def advance(core: Core, candidates: Candidates) -> Any:
    """What the core returns, or the words of its SearchError."""
    try:
        return core.advance(*candidates)
    except SearchError as error:
        return str(error)


def random_rows(rng: np.random.Generator, rows: int, vocabulary: int, levels: int | None, impossible: float) -> Float32:
    """Logits, on few levels so that ties abound or (None) all different; a share of them is -inf."""
    shape = rows, vocabulary
    drawn = rng.normal(0, 3, shape) if levels is None else rng.integers(-levels, levels, shape)
    logits = drawn.astype(np.float32)
    logits[rng.random(shape) < impossible] = -np.inf
    return logits


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data())
def test_equals_numpy_to_the_last_bit(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 40))
    config = data.draw(configs(vocabulary))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    levels, impossible = data.draw(st.sampled_from([1, 4, None])), data.draw(st.sampled_from([0.0, 0.0, 0.3, 0.9]))
    surplus = data.draw(st.integers(0, 3))  # an engine may return more than it was asked for
    images, length = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 5))
    prompts = rng.integers(0, vocabulary, (images, length))
    for prompt in prompts:
        prompt[: rng.integers(length)] = NO_TOKEN
    end_token = int(rng.integers(vocabulary))
    cores: list[Core] = [make(prompts, config, end_token, vocabulary) for make in (native_search, NumpySearch)]
    rows = images
    while True:
        assert cores[0].k == cores[1].k <= vocabulary
        candidates = numpy_top_k(random_rows(rng, rows, vocabulary, levels, impossible), cores[0].k + surplus)
        native, twin = (advance(core, candidates) for core in cores)
        if isinstance(twin, str):
            assert "No caption is possible" in twin
            assert native == twin
            return
        tokens, parents, kept = native
        assert (tokens.dtype, parents.dtype, tokens.shape) == (np.int64, np.int64, (len(parents), 1))
        assert_array_equal(tokens, twin[0])
        assert_array_equal(parents, twin[1])
        assert (kept is None) == (twin[2] is None)
        if kept is not None:
            assert_array_equal(kept, twin[2])
            if not len(kept):
                break
        rows = len(parents)
    assert cores[0].captions() == cores[1].captions()


@pytest.mark.parametrize("make", [native_search, NumpySearch])
@pytest.mark.parametrize(
    ("logits", "token_ids", "logsumexp", "message"),
    [
        (np.zeros((2, 8)), np.zeros((2, 8)), np.zeros(2), r"logits, token ids and a logsumexp for each of 1 rows\.$"),
        (np.zeros((1, 8)), np.zeros((1, 7)), np.zeros(1), "for each of 1 rows"),
        (np.zeros((1, 8)), np.zeros((1, 8)), np.zeros(2), "for each of 1 rows"),
        (np.zeros((1, 5)), np.zeros((1, 5)), np.zeros(1), r"returned 5 candidates a row, an exact search takes 6 here"),
        (np.full((1, 8), np.nan), np.zeros((1, 8)), np.zeros(1), "not numbers"),
        (np.full((1, 8), np.inf), np.zeros((1, 8)), np.zeros(1), "not numbers"),
        (np.zeros((1, 8)), np.zeros((1, 8)), np.full(1, np.nan), "not numbers"),
    ],
)
def test_refuses_candidates(make: MakeCore, logits: Any, token_ids: Any, logsumexp: Any, message: str) -> None:
    core = make(np.array([[1]]), SearchConfig(num_beams=3), 0, 20)
    with pytest.raises(SearchError, match=message):
        core.advance(logits.astype(np.float32), token_ids.astype(np.int64), logsumexp.astype(np.float32))
    good = numpy_top_k(np.linspace(1, 0, 20, dtype=np.float32)[None], 6)
    assert core.advance(*good)[0].tolist() == [[1], [2], [3]]  # 0 is the end


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_top_k_equals_numpy(data: st.DataObject) -> None:
    rows, size = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 2, 63, 64, 65, 511, 512, 513, 1100]))
    k = data.draw(st.integers(1, size + 1) | st.integers(1, min(size, 12)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    levels, impossible = data.draw(st.sampled_from([1, 4, None])), data.draw(st.sampled_from([0.0, 0.5, 0.999, 1.0]))
    logits = random_rows(rng, rows, size, levels, impossible)
    logits *= data.draw(st.sampled_from([1.0, 1e-3, 30.0]))
    native, twin = top_k(logits, k), numpy_top_k(logits, k)
    assert_array_equal(native.logits, twin.logits)
    assert_array_equal(native.token_ids, twin.token_ids)
    assert [each.dtype for each in native] == [each.dtype for each in twin]
    # Nearer than float32 tells apart logits of this size, and the sum of many.
    assert_allclose(native.logsumexp, twin.logsumexp, rtol=2.5e-7, atol=5e-7)


def test_top_k_of_a_large_vocabulary() -> None:
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(-40, 6, (4, 50_257)), np.full((1, 50_257), 2.5)]).astype(np.float32)
    found = top_k(logits, 30)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :30]
    assert_array_equal(found.token_ids, best)
    assert_array_equal(found.logits, np.take_along_axis(logits, best, axis=1))
    assert_allclose(found.logsumexp, np.log(np.exp(logits.astype(np.float64)).sum(axis=1)), rtol=1e-7, atol=2e-7)


@pytest.mark.parametrize("function", [top_k, numpy_top_k])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 599])
def test_top_k_shows_what_is_not_a_number(function: Callable[..., Any], bad: float, place: int) -> None:
    logits = np.zeros((2, 600), np.float32)
    logits[0, place] = bad
    found = function(logits, 4)
    assert not found.logsumexp[0] < np.inf
    assert found.logsumexp[1] == np.float32(np.log(600))
    assert found.token_ids[1].tolist() == [0, 1, 2, 3]


def test_top_k_takes_any_layout() -> None:
    logits = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)
    logits.flags.writeable = False
    expected = numpy_top_k(logits.T, 5)
    for native, twin in zip(top_k(logits.T, 5)[:2], expected[:2], strict=True):
        assert_array_equal(native, twin)


def test_other_threads_run_meanwhile() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 50_257)).astype(np.float32)
    thread = threading.Thread(target=top_k, args=(logits, 50_257))  # a third of a second
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        turns = sum(1 for _ in iter(thread.is_alive, False))
    finally:
        sys.setswitchinterval(interval)
    assert turns > 100_000  # over a million; if it held the interpreter's lock, about 10,000
