"""Stage 2: a small GPT-2 that knows nothing but Flickr8k's captions; the captioner's frozen language model.

Its tokenizer and weights are learnt from the 30,000 training captions alone. The weights that an int8 bundle
stores as integers are snapped to that grid at the end, so that the adapters train against what ships.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import clean_captions
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from itune.export.quantize.weights import snap_blockwise

END = "<|endoftext|>"
IGNORED = -100
POSITIONS = 64
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
def perplexity(model: GPT2LMHeadModel, sequences: list[list[int]], *, bf16: bool = False) -> float:
    """Perplexity per token, including the end token."""
    model.eval()
    losses = [token_losses(model, batch, bf16=bf16).double() for batch in batches(sequences, 256, None)]
    return math.exp(torch.cat(losses).mean().item())


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


def train(arguments: argparse.Namespace) -> None:
    """Train (or resume training), then snap the best epoch's weights and write `language-model/`."""
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    work = arguments.output / "language-model-training"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, best = work / "checkpoint.pt", work / "best"

    texts = {split: clean_captions(arguments.data, split) for split in ("train", "dev")}
    tokenizer = train_tokenizer(texts["train"], arguments.vocab_size)
    end = tokenizer.eos_token_id
    ids = {split: [[end, *row, end] for row in tokenizer(rows)["input_ids"]] for split, rows in texts.items()}
    model = build_model(arguments, tokenizer)
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments.weight_decay), betas=(0.9, 0.98), fused=True)
    count = {split: sum(len(row) - 1 for row in rows) for split, rows in ids.items()}
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(f"{parameters:.1f}M parameters, {len(tokenizer)} tokens; tokens per epoch {count}")

    state = State()
    if arguments.resume and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved.pop("model"))
        optimizer.load_state_dict(saved.pop("optimizer"))
        state = State(**saved)
        console.print(f"resumed after epoch {state.epoch}")

    steps = math.ceil(len(ids["train"]) / arguments.batch_size)
    total = steps * arguments.epochs
    for epoch in range(state.epoch, arguments.epochs):
        generator = torch.Generator().manual_seed(arguments.seed + epoch)
        torch.manual_seed(arguments.seed + epoch)  # also seeds dropout: a resumed run equals an unbroken one
        model.train()
        started, losses = time.monotonic(), []
        rows = batches(ids["train"], arguments.batch_size, generator)
        for step, batch in enumerate(track(rows, f"epoch {epoch + 1}", steps, console=console, transient=True)):
            rate = learning_rate(epoch * steps + step, total, peak=arguments.learning_rate, warmup=arguments.warmup)
            loss = token_losses(model, batch, bf16=arguments.bf16).mean()
            optimizer_step(model, optimizer, loss, rate)
            losses.append(loss.item())
        seconds = time.monotonic() - started
        dev = perplexity(model, ids["dev"], bf16=arguments.bf16)
        state.epoch = epoch + 1
        if dev < state.best_perplexity:
            state.best_perplexity, state.best_epoch = dev, epoch + 1
            save_model(best, model, tokenizer)
        save_checkpoint(checkpoint, model, optimizer, state)
        console.print(
            f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}, dev perplexity {dev:.2f}, "
            f"{seconds:.0f} s, {count['train'] / seconds:.0f} tokens/s"
        )

    model = GPT2LMHeadModel.from_pretrained(best)
    before = perplexity(model, ids["dev"])
    snap_to_int8(model)
    after = perplexity(model, ids["dev"])
    save_model(arguments.output / "language-model", model, tokenizer)
    result = {
        "best_epoch": state.best_epoch,
        "dev_perplexity": before,
        "dev_perplexity_int8": after,
        "dev_nats_per_caption": math.log(after) * count["dev"] / len(ids["dev"]),
    }
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


def parse_arguments() -> argparse.Namespace:
    """The defaults are the recipe's own values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="Flickr8k's folder")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write language-model/")
    parser.add_argument("--resume", action="store_true", help="resume after the last complete epoch")
    parser.add_argument("--vocab-size", type=int, default=6000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=64, help="captions")
    add_training_options(parser, epochs=8, dropout=0.3, learning_rate=1e-3, warmup=400, bf16=True)
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_arguments())
