"""The core in C++ against its NumPy twin: the same tokens at every step and the same scores, on random candidates."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from itune.runtime.engines.base import Candidates
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import CORE, NATIVE
from itune.runtime.search.numpy_search import NO_TOKEN, NumpySearch
from tests.runtime.fake_engine import best_of

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


def random_rows(rng: np.random.Generator, rows: int, vocabulary: int, levels: int | None, impossible: float) -> Any:
    """Logits on few levels, so that ties abound, or (None) all different; a share of them is -inf."""
    shape = rows, vocabulary
    drawn = rng.normal(0, 3, shape) if levels is None else rng.integers(-levels, levels, shape)
    logits = drawn.astype(np.float32)
    logits[rng.random(shape) < impossible] = -np.inf
    return logits


@settings(max_examples=600, deadline=None, derandomize=True)
@given(st.data())
def test_equals_numpy(data: st.DataObject) -> None:
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
    cores = [make(prompts, config, end_token, vocabulary) for make in (CORE, NumpySearch)]
    rows, kept = images, None
    while kept is None or len(kept):
        assert cores[0].k == cores[1].k <= vocabulary
        candidates = best_of(random_rows(rng, rows, vocabulary, levels, impossible), cores[0].k + surplus)
        native, twin = (core.advance(*candidates) for core in cores)
        tokens, parents, kept = native
        assert (tokens.dtype, parents.dtype, tokens.shape) == (np.int64, np.int64, (len(parents), 1))
        assert_array_equal(tokens, twin[0])
        assert_array_equal(parents, twin[1])
        assert (kept is None) == (twin[2] is None)
        if kept is not None:
            assert_array_equal(kept, twin[2])
        rows = len(parents)
    for native_captions, twin_captions in zip(*(core.captions() for core in cores), strict=True):
        assert [tokens for tokens, _ in native_captions] == [tokens for tokens, _ in twin_captions]
        expected = pytest.approx([score for _, score in twin_captions], rel=1e-12, abs=1e-12)
        assert [score for _, score in native_captions] == expected


def test_other_threads_run_meanwhile() -> None:
    size = 200_000
    core = CORE(np.ones((40, 1), np.int64), SearchConfig(num_beams=1, do_sample=True, top_k=0), 0, size)
    logits = np.random.default_rng(0).normal(size=(40, size)).astype(np.float32)  # unsorted: a third of a second
    candidates = Candidates(logits, np.tile(np.arange(size), (40, 1)), np.zeros(40, np.float32))
    thread = threading.Thread(target=core.advance, args=candidates)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        thread.start()
        turns = sum(1 for _ in iter(thread.is_alive, False))
    finally:
        sys.setswitchinterval(interval)
    assert turns > 100_000  # over a million; about 10,000 if the interpreter's lock were held
