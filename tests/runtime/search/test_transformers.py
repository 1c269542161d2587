"""The search against `transformers.generate`, on a small random GPT-2 with weights large enough to decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from itune.runtime.engines.base import Bool, Candidates, Int64, UInt8
from itune.runtime.search import Hypothesis, SearchConfig
from tests.runtime.fake_engine import Search

VOCABULARY, END = 60, 59
CLOSE = 1e-4
"""Scores of transformers nearer than this are a tie, which it breaks as its float32 happens to fall."""


class WatchedGPT2(GPT2LMHeadModel):
    """GPT-2 that notes how near `generate` came to deciding otherwise."""

    gap = np.inf

    def note(self, scores: torch.Tensor) -> None:
        """Note the smallest gap between `scores`; what transformers marks as absent has -1e9."""
        present = scores[scores > -1e8].sort().values
        if len(present) > 1:
            self.gap = min(self.gap, float(present.diff().min()))

    def _get_top_k_continuations(self, **kwargs: Any) -> Any:
        self.note(kwargs["accumulated_log_probs"].topk(kwargs["beams_to_keep"] + 1).values)
        return super()._get_top_k_continuations(**kwargs)

    def _update_finished_beams(self, **kwargs: Any) -> Any:
        length = kwargs["cur_len"] + 1 - kwargs["decoder_prompt_len"]
        ending = kwargs["next_token_hits_stopping_criteria"] & kwargs["top_num_beam_mask"]
        new = kwargs["topk_log_probs"][ending] / length ** kwargs["length_penalty"]
        self.note(torch.cat([kwargs["beam_scores"][0], new]))
        return super()._update_finished_beams(**kwargs)

    def _check_early_stop_heuristic(self, **kwargs: Any) -> Any:
        never = kwargs["early_stopping"] == "never" and kwargs["length_penalty"] > 0
        length = (kwargs["max_length"] if never else kwargs["cur_len"]) - kwargs["decoder_prompt_len"]
        reachable = kwargs["running_beam_scores"][0, :1] / length ** kwargs["length_penalty"]
        self.note(torch.cat([kwargs["beam_scores"].min().reshape(1), reachable]))
        return super()._check_early_stop_heuristic(**kwargs)


@pytest.fixture(scope="module")
def model() -> Iterator[WatchedGPT2]:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5,
        bos_token_id=END, eos_token_id=END,
    )  # fmt: skip
    model = WatchedGPT2(config).eval()
    model.lm_head.weight.data[END] *= 3  # a loud end token: captions of every length
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only lose by being shared out
    yield model
    torch.set_num_threads(threads)


class HistoryState:
    """The images still present, and the history of every row of the last step."""

    embedding = None

    def __init__(self, images: int):
        self.images = images
        self.histories: list[list[int]] = []

    def keep(self, images: Int64) -> None:
        self.images = len(images)


class HistoryEngine:
    """Eager GPT-2 without a cache: every step runs the whole history of its rows, left-padded."""

    most_candidates = VOCABULARY

    def __init__(self, model: GPT2LMHeadModel):
        self.model = model

    def encode(self, pixels: UInt8) -> HistoryState:
        return HistoryState(len(pixels))

    def step(
        self, tokens: Int64, parents: Int64, state: HistoryState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        real = np.ones_like(tokens, bool) if mask is None else mask
        past = [state.histories[parent] for parent in parents] if state.histories else [[] for _ in parents]
        state.histories = [old + new[kept].tolist() for old, new, kept in zip(past, tokens, real, strict=True)]
        longest = max(map(len, state.histories))
        input_ids = torch.tensor([[END] * (longest - len(row)) + row for row in state.histories])
        attention_mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in state.histories])
        position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids).logits[
                :, -1
            ]
        best = logits.sort(dim=-1, descending=True, stable=True)
        return Candidates(best.values[:, :k].numpy(), best.indices[:, :k].numpy(), logits.logsumexp(dim=-1).numpy())


def oracle(model: WatchedGPT2, prompt: list[int], config: SearchConfig) -> list[Hypothesis]:
    """`generate` on one image alone; `model.gap` is then the smallest score gap that decided something."""
    model.gap = np.inf
    beams = config.num_beams > 1
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        num_beams=config.num_beams,
        num_return_sequences=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        min_new_tokens=config.min_new_tokens,
        no_repeat_ngram_size=config.no_repeat_ngram_size,
        repetition_penalty=config.repetition_penalty,
        bad_words_ids=[list(word) for word in config.bad_words] or None,
        eos_token_id=END,
        pad_token_id=END,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **({"length_penalty": config.length_penalty, "early_stopping": config.early_stopping} if beams else {}),
    )
    generated = out.sequences[:, len(prompt) :].tolist()
    captions = [tuple(row[: row.index(END)] if END in row else row) for row in generated]
    if beams:
        scores = out.sequences_scores.tolist()
    else:
        for processed in out.scores:
            model.note(processed[0].topk(2).values)
        [row] = generated
        chosen = [logits[0].log_softmax(-1)[token] for logits, token in zip(out.logits, row, strict=True)]
        scores = [float(sum(chosen)) / len(row) ** config.length_penalty]
    return [Hypothesis(*pair) for pair in zip(captions, scores, strict=True)]


def random_config(rng: np.random.Generator, num_beams: int) -> SearchConfig:
    """Each processor in about a third of the searches, so that many run alone and many together."""
    max_new_tokens = int(rng.integers(1, 13))

    def sometimes(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.35 else otherwise

    words = [tuple(rng.integers(0, VOCABULARY, rng.integers(1, 3)).tolist()) for _ in range(12)]
    return SearchConfig(
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        min_new_tokens=sometimes(int(rng.integers(0, max_new_tokens + 1)), 0),
        length_penalty=float(rng.choice([-0.5, 0.0, 0.7, 1.0, 2.0])),
        early_stopping=[False, True, "never"][rng.integers(3)],  # type: ignore[arg-type]
        no_repeat_ngram_size=sometimes(int(rng.integers(1, 4)), 0),
        repetition_penalty=sometimes(float(rng.uniform(1.05, 2.5)), 1.0),
        bad_words=sometimes((*words, (END,)), ()),
    )


@pytest.mark.parametrize("num_beams", [1, 2, 3, 5, 8])
def test_equals_generate(search: Search, model: WatchedGPT2, num_beams: int) -> None:
    rng = np.random.default_rng(num_beams)
    compared = ended = excused = 0
    for _ in range(20):
        config = random_config(rng, num_beams)
        prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in rng.integers(1, 5, rng.integers(1, 6))]
        found = search(HistoryEngine(model), HistoryState(len(prompts)), prompts, config, END)
        for prompt, ours in zip(prompts, found, strict=True):
            theirs = oracle(model, prompt, config)
            compared += 1
            if [caption.tokens for caption in ours] != [caption.tokens for caption in theirs]:
                excused += 1
                assert model.gap < CLOSE, (config, prompt, ours, theirs)
                continue
            ended += len(ours[0].tokens) < config.max_new_tokens
            assert [caption.score for caption in ours] == pytest.approx(
                [caption.score for caption in theirs], rel=1e-4, abs=1e-4
            )
    assert excused <= compared // 20
    assert compared // 5 < ended < compared
