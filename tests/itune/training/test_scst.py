"""Self-critical training: its gradient against exact enumeration, its rewards, its optimum, and resuming."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from itune.backbones import load_vision_tower
from itune.data.features import Features
from itune.data.records import Record
from itune.eager import EagerEngine
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.metrics import CiderD
from itune.runtime.search import SearchConfig
from itune.runtime.search.loop import search
from itune.training.batches import Batch, TokenizedRecord, make_batch, pack_batch
from itune.training.config import ConfigError, resolve
from itune.training.loop import Interrupted, Trainer
from itune.training.objectives.rewards import CaptionRewards, Rewarder, RewardsLostError, caption_words
from itune.training.objectives.scst import SelfCritical, _Drawn
from tests.conftest import refused
from tests.itune.methods import test_clipcap
from tests.itune.training import test_loop
from tests.itune.training.test_loop import Quiet

END, LONGEST = 0, 3
WORDS = ["<end>", "dog", "cat", "runs", "<begin>"]
PHOTOS = [Path("a"), Path("b"), Path("c")]
REFERENCES = {PHOTOS[0]: ["dog runs"], PHOTOS[1]: ["cat"], PHOTOS[2]: ["runs dog"]}


@pytest.fixture
def toy(clip_folder: Path) -> SelfCritical:
    """A model with a vocabulary of three words, which can write 40 captions."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    torch.manual_seed(0)
    sizes = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, attn_implementation="eager"))
    with torch.no_grad():
        gpt2.lm_head.weight[4] = 0  # the begin token is as likely as any, but the test leaves it out below
    model = ITuningModel(gpt2, AdapterConfig(16, 8, 8, 1, 4.0, dropout=0.5), 0)
    config = resolve("scst", precision="fp32", max_new_tokens=LONGEST, scst_samples=100)
    records = [Record(photo, tuple(own), photo.name) for photo, own in REFERENCES.items()]
    return SelfCritical(config, model, load_vision_tower(str(clip_folder)), tokenizer, END, records)


def photos_batch() -> tuple[Batch, Tensor]:
    records = [TokenizedRecord(photo, (4,), ((END,),), True) for photo in PHOTOS]
    return make_batch(records, [False] * 3), torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def possible_captions() -> list[tuple[int, ...]]:
    """Every caption of at most LONGEST tokens, with its end token unless it is cut."""
    words = [i for i in range(len(WORDS)) if i != END]
    ended = [(*each, END) for length in range(LONGEST) for each in product(words, repeat=length)]
    return ended + list(product(words, repeat=LONGEST))


def gradient(toy: SelfCritical) -> Tensor:
    weights = [weight.grad for weight in toy.model.adapters.parameters()]
    toy.model.zero_grad()
    return torch.cat([weight.flatten() for weight in weights if weight is not None])


def test_the_gradient_is_that_of_the_expected_reward(toy: SelfCritical) -> None:
    batch, visual = photos_batch()
    captions = possible_captions()
    records = [replace(record, captions=tuple(captions)) for record in batch.records]
    every = make_batch(records, batch.flip)
    nll = torch.nn.functional.cross_entropy(
        toy.model.scored_logits(every.input_ids, every.mask, visual), every.input_ids[every.mask], reduction="none"
    )
    lengths = [len(caption) for caption in captions] * 3
    log_p = -torch.stack([part.sum() for part in nll.split(lengths)]).reshape(3, len(captions))
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(3))
    texts = [toy.tokenizer.decode([token for token in caption if token != END]) for caption in captions]
    ends = [caption[-1] == END for caption in captions]
    rewards = torch.tensor(CaptionRewards(REFERENCES)(PHOTOS, [texts] * 3, [ends] * 3))
    (-(log_p.exp() * rewards).sum() / 3).backward()
    exact = gradient(toy)

    torch.manual_seed(0)
    found = []
    # Few samples, since a wrong baseline would shrink the gradient by 1 / samples.
    toy.config = toy.config.model_copy(update={"scst_samples": 3})
    many = make_batch(batch.records * 40, [False] * 120)
    for _ in range(40):
        metrics = toy.backward(1, [many], [visual.repeat(40, 1, 1)])
        found.append(gradient(toy))
    estimates = torch.stack(found)
    error = estimates.std(0) / len(found) ** 0.5
    assert (estimates.mean(0) - exact).abs().le(5 * error + 1e-6).all()
    assert error.norm() < 0.2 * exact.norm(), "too noisy to tell"
    expected = float((log_p.detach().exp() * rewards).sum(1).mean())
    assert metrics["reward"] == pytest.approx(expected, rel=0.2)


def test_training_reaches_the_caption_of_the_highest_reward(toy: SelfCritical) -> None:
    toy.config = toy.config.model_copy(update={"scst_samples": 20})
    batch, visual = photos_batch()
    optimizer = torch.optim.Adam(toy.model.adapters.parameters(), 0.02)

    def greedy() -> list[str]:
        engine = EagerEngine(toy.model, toy.tower)
        options = SearchConfig(num_beams=1, max_new_tokens=LONGEST)
        found = search(engine, engine.encode_features(visual), [(4,)] * 3, options, END)
        return [toy.tokenizer.decode(list(each[0].tokens)) for each in found]

    assert greedy() != [own[0] for own in REFERENCES.values()]
    for step in range(150):
        torch.manual_seed(step)
        toy.backward(step, [batch], [visual])
        optimizer.step()
        optimizer.zero_grad()
    assert greedy() == [own[0] for own in REFERENCES.values()]


def test_packed_captions_get_their_own_advantages(toy: SelfCritical) -> None:
    captions = (((1, 3, 0), (2, 0)), ((0,), (3, 1, 2)), ((3, 0), (1, 0)))
    records = [
        TokenizedRecord(photo, (4, *[1] * i), own, True)
        for i, (photo, own) in enumerate(zip(PHOTOS, captions, strict=True))
    ]
    advantages = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 4.0]])
    visual = photos_batch()[1]
    losses = []
    for batch in (make_batch(records, [False] * 3), pack_batch(records, [False] * 3)):
        drawn = _Drawn(batch, visual, toy.rewarder.submit([], [], []))
        losses.append(toy._loss(drawn, advantages))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(
        losses[0],
        sum(
            advantages[i, j] * toy.model.loss(one.input_ids, one.mask, visual[i : i + 1])
            for i, record in enumerate(records)
            for j, caption in enumerate(record.captions)
            for one in [make_batch([replace(record, captions=(caption,))], [False])]
        ),
    )


def test_rewards_are_cider_d_with_an_end() -> None:
    references = {
        Path("a"): ["a man on a horse", "a rider on a brown horse"],
        Path("b"): ["a dog in the grass"],
        Path("c"): ["a cat on a sofa", "a cat"],
    }
    samples = [["a man on a horse", "a man on a"], ["a dog", "grass"]]
    photos, ends = [Path("a"), Path("b")], [[True, True], [True, False]]
    found = CaptionRewards(references)(photos, samples, ends)
    cider = CiderD([[caption_words(each, True) for each in own] for own in references.values()])
    for j in range(2):
        words = [*(caption_words(samples[i][j], ends[i][j]) for i in range(2)), []]
        assert [row[j] for row in found] == cider.per_image(words)[:2]
    assert Rewarder(references).submit(photos, samples, ends)() == found
    cut, ended = CaptionRewards(references)([Path("a")], [["a man on a", "a man on a"]], [[False, True]])[0]
    plain = CiderD([list(map(str.split, own)) for own in references.values()])
    without = (
        plain.per_image([["a", "man", "on", "a"], [], []])[0] / plain.per_image([samples[0][0].split(), [], []])[0]
    )
    assert max(cut, ended) / found[0][0] < without, "the end makes a bad one worse"


@pytest.mark.parametrize("method", ["i-tuning", "smallcap", "clipcap"])
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(
    method: str, language_model_folder: Path, projecting: Path, records: list[Record], tmp_path: Path
) -> None:
    make: Any = test_clipcap.make_trainer
    settings: dict[str, Any] = {"objective": "scst", "scst_samples": 3, "epochs": 2, "batch_size": 6, "flip": True}
    if method == "clipcap":
        settings["visual_dropout"] = None  # set by the maker, but for cross-entropy alone
    else:
        settings |= {"method": method, "retrieve": 0}
        live = Features(load_vision_tower(str(projecting)))

        def make(lm: Path, vision: Path, records: list[Record], output: Path, **settings: Any) -> Trainer:
            return test_loop.make_trainer(lm, vision, records, output, live, **settings)

    def trainer(output: str) -> Trainer:
        made: Trainer = make(language_model_folder, projecting, records, tmp_path / output, **settings)
        return made

    whole = trainer("whole")
    whole.run(Quiet())
    first = trainer("stopped")
    with pytest.raises(Interrupted):
        first.run(Quiet(first, 3))
    second = trainer("stopped")
    second.resume()
    second.run(Quiet())
    state = whole.output / "last" / "trainer.safetensors"
    expected, found = load_file(state), load_file(second.output / "last" / "trainer.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    fresh = trainer("fresh").model.adapter_state()
    assert any(not torch.equal(weight, fresh[name]) for name, weight in whole.model.adapter_state().items())


def test_the_reward_process_survives_signals_but_not_a_kill() -> None:
    rewarder = Rewarder({Path("a"): ["a man on a horse"], Path("b"): ["two dogs"]})
    arguments = [Path("a")], [["a man", "a man on a horse"]], [[True, True]]
    expected = rewarder.submit(*arguments)()
    (process,) = rewarder._pool._processes.values()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process.pid, number)
    assert rewarder.submit(*arguments)() == expected
    process.kill()
    process.join()
    with pytest.raises(RewardsLostError):
        rewarder.submit(*arguments)()


def test_settings_of_the_other_objective_are_refused() -> None:
    for objective, field, value in (("scst", "dropout", 0.1), ("cross-entropy", "scst_samples", 3)):
        with refused(ConfigError, f"--{field.replace('_', '-')}", objective):
            resolve("base", objective=objective, **{field: value})
