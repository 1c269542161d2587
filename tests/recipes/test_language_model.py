"""The recipe for a language model, on a tiny one: perplexity per word, and a run that was killed."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from recipes import language_model
from tests.conftest import CAPTIONS


@pytest.fixture
def arguments(tmp_path: Path) -> Namespace:
    (tmp_path / "text.txt").write_text("\n".join(CAPTIONS * 4))
    (tmp_path / "dev.jsonl").write_text(json.dumps({"image": "a.jpg", "captions": CAPTIONS[:2]}))
    command = f"--text {tmp_path}/text.txt --dev {tmp_path}/dev.jsonl --vocab-size 300 --layers 1 --width 16 --heads 2"
    command += " --epochs 2 --batch-size 4 --warmup 1 --threads 1"
    return language_model.parse_arguments([*command.split(), "--output", str(tmp_path / "whole")])


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(
    arguments: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    language_model.train(arguments)
    whole = GPT2LMHeadModel.from_pretrained(tmp_path / "whole" / "language-model").state_dict()

    save = language_model.save_checkpoint
    saves: list[int] = []

    def killed(path: Path, model: Any, optimizer: Any, state: language_model.State) -> None:
        save(path, model, optimizer, state)
        saves.append(state.step)
        if len(saves) == 3:
            raise SystemExit

    arguments.output = tmp_path / "killed"
    monkeypatch.setattr(language_model, "SAVE_SECONDS", 0)
    monkeypatch.setattr(language_model, "save_checkpoint", killed)
    with pytest.raises(SystemExit):
        language_model.train(arguments)
    language_model.train(arguments)
    found = GPT2LMHeadModel.from_pretrained(tmp_path / "killed" / "language-model").state_dict()
    assert saves[:4] == [1, 2, 3, 4], "it went on where it had stopped"
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


@torch.inference_mode()
def test_perplexity_is_per_word(arguments: Namespace) -> None:
    corpus = language_model.Corpus(arguments.text, arguments.dev, arguments.vocab_size)
    model = language_model.build_model(arguments, corpus.tokenizer).eval()
    (rows,) = (corpus.tokenized(texts) for texts in corpus.dev.values())
    nats = sum(float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1) for row in rows)
    words = sum(len(caption.split()) + 1 for caption in CAPTIONS[:2])
    assert corpus.perplexities(model) == {"dev": pytest.approx(math.exp(nats / words), rel=1e-4)}
