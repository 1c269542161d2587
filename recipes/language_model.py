"""Stage 2: a small GPT-2 that knows nothing but captions; the captioner's frozen language model.

Its tokenizer and weights are learnt from a text file alone, a caption a line. The weights that an int8 bundle stores as
integers are snapped to that grid at the end, so that the adapters train against what ships. Started again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from itune.export.quantize.weights import snap_blockwise
from recipes.captions import read_jsonl

END = "<|endoftext|>"
IGNORED = -100
POSITIONS = 64
SAVE_SECONDS = 300
"""A killed run loses at most this much."""
console = Console(width=110)


def train_tokenizer(texts: list[str], vocab_size: int) -> GPT2TokenizerFast:
    """A byte-level BPE like GPT-2's own, learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return GPT2TokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=POSITIONS
    )


def batches(sequences: list[list[int]], size: int, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Token ids [B, T + 1] of captions of about the same length, padded with -100; shuffled by `generator`."""
    order = list(range(len(sequences)))
    if generator is not None:
        order = torch.randperm(len(sequences), generator=generator).tolist()
    order.sort(key=lambda i: len(sequences[i]))  # stable: the shuffle survives among equal lengths
    starts = list(range(0, len(order), size))
    if generator is not None:
        starts = [starts[i] for i in torch.randperm(len(starts), generator=generator).tolist()]
    for start in starts:
        rows = [torch.tensor(sequences[i]) for i in order[start : start + size]]
        yield nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def token_losses(model: GPT2LMHeadModel, batch: Tensor, *, bf16: bool) -> Tensor:
    """Cross-entropy [number of predicted tokens] of the caption and the final token.

    Captions are padded on the right, which a causal model never looks at: no mask is needed. The few padded
    positions go through the head too, so that the matrix shapes repeat and their kernels are reused.
    """
    inputs, targets = batch[:, :-1].clamp(min=0), batch[:, 1:].flatten()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(inputs, use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="none")
    return losses[targets != IGNORED]


@torch.inference_mode()
def perplexity_per_word(model: GPT2LMHeadModel, texts: list[str], sequences: list[list[int]]) -> float:
    """Perplexity per word of `texts`, tokenised as `sequences`; the end of a caption counts as a word.

    Unlike the perplexity per token, it compares models with different vocabularies.
    """
    model.eval()
    nats = sum(token_losses(model, batch, bf16=False).double().sum() for batch in batches(sequences, 256, None))
    return math.exp(float(nats) / sum(len(text.split()) + 1 for text in texts))


def learning_rate(step: int, total: int, *, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to a fiftieth of `peak`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class State:
    """The state of training, stored in the checkpoint file with the weights."""

    epoch: int = 0
    step: int = 0
    """Steps done in this epoch."""
    best_epoch: int = 0
    best_perplexity: float = math.inf


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write the resumable checkpoint atomically."""
    partial = path.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **vars(state)}, partial)
    partial.replace(path)


def save_model(folder: Path, model: GPT2LMHeadModel, tokenizer: GPT2TokenizerFast) -> None:
    """Write a Hugging Face folder, replacing an older one."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases and LayerNorms do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def optimizer_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """One optimiser step at the learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def snap_to_int8(model: GPT2LMHeadModel) -> None:
    """Round the matrices that the exporter quantises to its int8 grid (blocks along the input dimension)."""
    embedding = model.transformer.wte.weight
    embedding.copy_(torch.from_numpy(snap_blockwise(embedding.numpy())))
    for block in model.transformer.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            weight = layer.weight.numpy()  # Conv1D: [in, out]
            layer.weight.copy_(torch.from_numpy(snap_blockwise(weight.T.copy()).T.copy()))


def build_model(arguments: argparse.Namespace, tokenizer: GPT2TokenizerFast) -> GPT2LMHeadModel:
    """A GPT-2 with fresh weights."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=arguments.width,
        n_layer=arguments.layers,
        n_head=arguments.heads,
        embd_pdrop=arguments.dropout,
        resid_pdrop=arguments.dropout,
        attn_pdrop=arguments.attention_dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # the fused kernel's bf16 backward is slower on a CPU at these lengths
    )
    model = GPT2LMHeadModel(config)
    for block in model.transformer.h:
        block.mlp.act = nn.GELU(approximate="tanh")  # the same function as gelu_new, in one kernel
    return model


class Corpus:
    """The captions that train the language model, and the dev captions of each set of photos."""

    def __init__(self, text: Path, dev: Sequence[Path], vocab_size: int) -> None:
        lines = text.read_text(encoding="utf-8").splitlines()
        self.tokenizer = train_tokenizer(lines, vocab_size)
        self.train = self.tokenized(lines)
        self.dev = {path.stem: [each for own in read_jsonl(path).values() for each in own] for path in dev}

    def tokenized(self, texts: list[str]) -> list[list[int]]:
        """Token ids [end, caption, end], cut to the model's positions."""
        end = self.tokenizer.eos_token_id
        return [[end, *row, end][: POSITIONS + 1] for row in self.tokenizer(texts)["input_ids"]]

    def perplexities(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """Perplexity per word of each set's dev captions."""
        return {name: perplexity_per_word(model, texts, self.tokenized(texts)) for name, texts in self.dev.items()}


def train(arguments: argparse.Namespace) -> None:
    """Train (or resume training), then snap the best epoch's weights and write `language-model/`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    work = arguments.output / "language-model-training"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, best = work / "checkpoint.pt", work / "best"

    corpus = Corpus(arguments.text, arguments.dev, arguments.vocab_size)
    model = build_model(arguments, corpus.tokenizer)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments.weight_decay), betas=(0.9, 0.98), fused=True)
    tokens = sum(len(row) - 1 for row in corpus.train)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"{parameters:.1f}M parameters, {len(corpus.tokenizer)} tokens; {tokens:,} tokens per epoch")

    state = State()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = State(**saved)
        console.print(f"resumed at step {state.step} of epoch {state.epoch + 1}")

    steps = math.ceil(len(corpus.train) / arguments.batch_size)
    total = steps * arguments.epochs
    for epoch in range(state.epoch, arguments.epochs):
        rows = batches(corpus.train, arguments.batch_size, torch.Generator().manual_seed(arguments.seed + epoch))
        model.train()
        started, losses = time.monotonic(), []
        for step, batch in enumerate(track(rows, f"epoch {epoch + 1}", steps, console=console, transient=True)):
            if step < state.step:
                continue
            # Seeded by the step, so that a resumed run draws the same dropout as an unbroken one.
            torch.manual_seed(arguments.seed * 1_000_003 + epoch * steps + step)
            rate = learning_rate(epoch * steps + step, total, peak=arguments.learning_rate, warmup=arguments.warmup)
            loss = token_losses(model, batch, bf16=arguments.bf16).mean()
            optimizer_step(model, optimizer, loss, rate)
            losses.append(loss.item())
            if time.monotonic() - started > SAVE_SECONDS:
                state.step = step + 1
                save_checkpoint(checkpoint, model, optimizer, state)
                console.print(f"epoch {epoch + 1}, step {step + 1} of {steps}: loss {sum(losses) / len(losses):.3f}")
                started, losses = time.monotonic(), []
        found = corpus.perplexities(model)
        mean = sum(found.values()) / len(found)
        state.epoch, state.step = epoch + 1, 0
        if mean < state.best_perplexity:
            state.best_perplexity, state.best_epoch = mean, epoch + 1
            save_model(best, model, corpus.tokenizer)
        save_checkpoint(checkpoint, model, optimizer, state)
        console.print(f"epoch {epoch + 1}: dev perplexity per word {found}")

    model = GPT2LMHeadModel.from_pretrained(best)
    before = corpus.perplexities(model)
    snap_to_int8(model)
    after = corpus.perplexities(model)
    save_model(arguments.output / "language-model", model, corpus.tokenizer)
    result = {"best_epoch": state.best_epoch, "perplexity_per_word": before, "perplexity_per_word_int8": after}
    (work / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(result)


def add_training_options(
    parser: argparse.ArgumentParser, *, epochs: int, dropout: float, learning_rate: float, warmup: int, bf16: bool
) -> None:
    """Add the options that both language models share, with a recipe's own defaults."""
    parser.add_argument("--dropout", type=float, default=dropout)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--warmup", type=int, default=warmup, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=bf16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The defaults are the recipe's own values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="captions to learn, one a line")
    parser.add_argument("--dev", type=Path, required=True, nargs="+", help="JSON Lines of {image, captions} to measure")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write language-model/")
    parser.add_argument("--vocab-size", type=int, default=10_000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64, help="captions")
    add_training_options(parser, epochs=2, dropout=0.1, learning_rate=1e-3, warmup=400, bf16=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(parse_arguments())
