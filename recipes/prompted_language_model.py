"""A language model trained with prompts, as SmallCap and I-Tuning with retrieval need it.

The recipe's own language model was trained on bare captions only. It has 64 positions, and captions use the first 20.
This script extends it to 128 positions and continues training on the training captions, after prompts of four,
fewer or no captions retrieved for the same photo, and without a prompt. It sees no image.

    python -m recipes.prompted_language_model --work-dir WORK    # writes WORK/prompted/language-model/; can resume

WORK contains `train.jsonl`, `dev.jsonl`, `language-model/`, `vision/` and the `datastore/` of the training captions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, GPT2TokenizerFast

from itune.backbones import load_language_model, load_vision_tower
from itune.data.features import FeatureCache
from itune.data.records import Record, load_records
from itune.retrieval.encoder import load_head, retrieve_for
from itune.runtime.retrieval.datastore import Datastore
from itune.runtime.retrieval.prompts import PromptWriter
from itune.runtime.settings import RetrievalSettings, TextSettings
from itune.training.batches import Batch, TokenizedRecord, pack_batch, prompt_tokens, tokenize
from recipes.language_model import (
    State,
    add_training_options,
    console,
    learning_rate,
    optimizer_step,
    parameter_groups,
    save_checkpoint,
    save_model,
    snap_to_int8,
)

POSITIONS = 128
LONGEST_PROMPT = 100  # tokens
MIXTURE = (4, 4, 2, 0, 4, 4, 1, None)
"""Retrieved captions in a photo's prompt, by epoch; 0 is the prompt of an empty datastore, None means no prompt."""
TEXT = TextSettings(lower=True, strip_period=True)
PHOTOS = 32  # per step, with all their captions
DEV = 300  # the first dev photos, as in the training runs on this language model


class Prompts:
    """Tokenised captions after prompts with any number of retrieved captions."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = load_language_model(str(work / "language-model")).tokenizer
        tower, store = load_vision_tower(str(work / "vision")), Datastore.load(work / "datastore")
        head = load_head(tower, str(work / "vision"), store.manifest.encoder.pooling)
        self.writer = PromptWriter(self.tokenizer, TEXT, RetrievalSettings(encoder=head.encoder))
        self.begin = prompt_tokens(self.tokenizer, TEXT)
        features, cache = FeatureCache(work / "features", tower), work / "features"
        self.records: dict[str, list[Record]] = {}
        self.found: dict[str, list[str]] = {}
        for split, own in (("train", "captions"), ("dev", "photo")):
            records = self.records[split] = load_records(work / f"{split}.jsonl", split=None)
            features.prepare([record.image for record in records])
            self.found |= retrieve_for(
                records, features, store, max(filter(None, MIXTURE)), head, leave_out=own, cache=cache
            )

    def tokenized(self, split: str, captions: Sequence[int | None]) -> list[TokenizedRecord]:
        """The first photos of a split; `captions`: the number of captions in each photo's prompt."""
        heads = {}
        records = self.records[split][: len(captions)]
        for record, count in zip(records, captions, strict=True):
            prompt = [] if count is None else self.writer.write(self.found[record.id][:count], LONGEST_PROMPT)[0]
            heads[record.image] = (*self.begin, *prompt)
        return tokenize(records, self.tokenizer, TEXT, POSITIONS, prompts=heads, positions=POSITIONS)


def batches(records: Sequence[TokenizedRecord], rng: np.random.Generator | None) -> Iterator[Batch]:
    """Batches of photos whose prompts have about the same length, in random order if there is an `rng`."""
    order = np.arange(len(records)) if rng is None else rng.permutation(len(records))
    order = order[np.argsort([len(records[i].prompt) for i in order], kind="stable")]
    starts = np.arange(0, len(order), PHOTOS)
    for start in starts if rng is None else rng.permutation(starts):
        chosen = [records[i] for i in order[start : start + PHOTOS]]
        yield pack_batch(chosen, [False] * len(chosen))


def token_losses(model: GPT2LMHeadModel, batch: Batch, *, bf16: bool) -> Tensor:
    """Cross-entropy [caption and end tokens]."""
    packing = batch.packing
    assert packing is not None
    rows, columns = batch.mask.nonzero(as_tuple=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model.transformer(
            input_ids=batch.input_ids[:, :-1],
            position_ids=packing.positions[:, :-1],
            attention_mask=packing.attention_mask()[..., :-1, :-1],
            use_cache=False,
        )[0]
        logits = model.lm_head(hidden[rows, packing.sources[rows, columns]])
    return F.cross_entropy(logits.float(), batch.input_ids[batch.mask], reduction="none")


@torch.inference_mode()
def perplexity(model: GPT2LMHeadModel, records: Sequence[TokenizedRecord]) -> float:
    """Perplexity per caption token, including the end token."""
    model.eval()
    losses = [token_losses(model, batch, bf16=False).double() for batch in batches(records, None)]
    return math.exp(torch.cat(losses).mean().item())


def lengthened(folder: Path, dropout: float) -> GPT2LMHeadModel:
    """The recipe's language model with `POSITIONS` positions: the new ones start as copies of the old ones."""
    model: GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation="eager", embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=0.0
    )
    old = model.transformer.wpe.weight.detach()
    repeated = old.repeat(-(-POSITIONS // len(old)), 1)[:POSITIONS]
    model.transformer.wpe = nn.Embedding.from_pretrained(repeated, freeze=False)
    model.config.n_positions = POSITIONS
    return model


def train(arguments: argparse.Namespace) -> None:
    """Train (or resume training), then snap the best epoch's weights and write `language-model/`."""
    torch.set_num_threads(arguments.threads)
    work: Path = arguments.work_dir
    output = work / "prompted"
    (output / "training").mkdir(parents=True, exist_ok=True)
    checkpoint, best = output / "training" / "checkpoint.pt", output / "training" / "best"
    prompts = Prompts(work)
    tokenizer = GPT2TokenizerFast.from_pretrained(work / "language-model", model_max_length=POSITIONS)
    photos = min(DEV, len(prompts.records["dev"]))
    dev = {name: prompts.tokenized("dev", [count] * photos) for name, count in (("4", 4), ("0", 0), ("bare", None))}
    model = lengthened(work / "language-model", arguments.dropout)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments.weight_decay), betas=(0.9, 0.98), fused=True)
    state = State()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = State(**saved)

    def measured() -> dict[str, float]:
        return {name: perplexity(model, records) for name, records in dev.items()}

    console.print(f"after epoch {state.epoch}: dev perplexity {measured()}")
    photos = len(prompts.records["train"])
    steps = math.ceil(photos / PHOTOS)
    for epoch in range(state.epoch, arguments.epochs):
        torch.manual_seed(arguments.seed + epoch)
        rng = np.random.default_rng([arguments.seed, epoch])
        records = prompts.tokenized("train", [MIXTURE[(i + epoch) % len(MIXTURE)] for i in range(photos)])
        model.train()
        losses = []
        rows = track(batches(records, rng), f"epoch {epoch + 1}", steps, console=console, transient=True)
        for step, batch in enumerate(rows):
            rate = learning_rate(
                epoch * steps + step, steps * arguments.epochs, peak=arguments.learning_rate, warmup=arguments.warmup
            )
            loss = token_losses(model, batch, bf16=arguments.bf16).mean()
            optimizer_step(model, optimizer, loss, rate)
            losses.append(loss.item())
        found = measured()
        state.epoch = epoch + 1
        if found["4"] < state.best_perplexity:
            state.best_perplexity, state.best_epoch = found["4"], epoch + 1
            save_model(best, model, tokenizer)
        save_checkpoint(checkpoint, model, optimizer, state)
        console.print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, dev perplexity {found}")

    model = GPT2LMHeadModel.from_pretrained(best, attn_implementation="eager")
    snap_to_int8(model)
    save_model(output / "language-model", model, tokenizer)
    result = {"best_epoch": state.best_epoch, "dev_perplexity_int8": measured()}
    (output / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(result)


def parse_arguments() -> argparse.Namespace:
    """The defaults are the recipe's own values."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    add_training_options(parser, epochs=4, dropout=0.2, learning_rate=5e-4, warmup=50, bf16=True)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
