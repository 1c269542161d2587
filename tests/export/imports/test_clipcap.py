"""Published checkpoints of ClipCap, and the command lines from one to captions."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection, GPT2LMHeadModel

from itune.checkpoint import CheckpointError
from itune.data.records import Record
from itune.export.imports.checkpoint import import_checkpoint
from itune.export.options import ImportOptions
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.methods.schemas import load_config
from itune.runtime.settings import TextSettings
from tests.clipcap import papers_transformer
from tests.conftest import make_language_model


def published(
    folder: Path, lm: Path, *, mapper: str = "transformer", fine_tuned: bool = False, width: int = 20, gpt: bool = True
) -> Path:
    """A checkpoint in the layout of ClipCap's code, old releases' mask buffers included."""
    torch.manual_seed(9)
    d, length, clip_length = 32, 4, 3
    shapes: dict[str, tuple[int, ...]] = {}
    if mapper == "mlp":
        shapes |= {"model.0.weight": (d * length // 2, width), "model.0.bias": (d * length // 2,)}
        shapes |= {"model.2.weight": (d * length, d * length // 2), "model.2.bias": (d * length,)}
    else:
        shapes |= {"prefix_const": (length, d), "linear.weight": (clip_length * d, width), "linear.bias": (96,)}
        for i in range(2):
            layer = {"norm1.weight": (d,), "norm1.bias": (d,), "attn.to_queries.weight": (d, d)}
            layer |= {"attn.to_keys_values.weight": (2 * d, d), "attn.project.weight": (d, d)}
            layer |= {"attn.project.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
            layer |= {"mlp.fc1.weight": (2 * d, d), "mlp.fc1.bias": (2 * d,)}
            layer |= {"mlp.fc2.weight": (d, 2 * d), "mlp.fc2.bias": (d,)}
            shapes |= {f"transformer.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"clip_project.{name}": torch.randn(shape) * 0.7 for name, shape in shapes.items()}
    if gpt:
        language: Any = GPT2LMHeadModel.from_pretrained(lm)
        if fine_tuned:
            language.transformer.h[1].mlp.c_fc.weight.data += 0.1
        tensors |= {f"gpt.{name}": tensor for name, tensor in language.state_dict().items()}
        for i in range(3):
            tensors[f"gpt.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"gpt.transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "coco.pt")
    return folder / "coco.pt"


@pytest.mark.parametrize(("mapper", "fine_tuned"), [("transformer", False), ("mlp", True)])
def test_published_checkpoints_are_imported_exactly(
    mapper: str, fine_tuned: bool, projecting: Path, photos: list[Path], tmp_path: Path
) -> None:
    lm = make_language_model(tmp_path / "lm", n_head=8)
    file = published(tmp_path / "published", lm, mapper=mapper, fine_tuned=fine_tuned)
    options = ImportOptions(language_model=str(lm), vision=str(projecting), normalize=mapper == "mlp")
    import_checkpoint(file, tmp_path / "c", options)
    loaded = LoadedCheckpoint.load(tmp_path / "c")
    assert (tmp_path / "c" / "language-model").exists() == fine_tuned
    assert loaded.config.text == TextSettings(begin=None, end=".", strip_period=True)
    tensors = torch.load(file, weights_only=True)
    for name, tensor in loaded.model.adapter_state().items():
        if name.startswith("mapper."):
            assert torch.equal(tensor, tensors[name.replace("mapper.", "clip_project.", 1)]), name
    own = loaded.language.model.state_dict()
    assert all(torch.equal(tensor, tensors[f"gpt.{name}"]) for name, tensor in own.items())

    # What the original does: CLIP's image embedding, the mapper, GPT-2 on inputs_embeds until the period.
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    clip: Any = CLIPVisionModelWithProjection.from_pretrained(projecting)
    image = loaded.tower.image
    normalized = ((pixels / 255 - np.array(image.mean)) / np.array(image.std)).transpose(0, 3, 1, 2)
    w = {name.removeprefix("clip_project."): tensor for name, tensor in tensors.items()}
    with torch.inference_mode():
        embedding = clip(torch.from_numpy(normalized.astype(np.float32))).image_embeds
        if mapper == "mlp":
            embedding = embedding / embedding.norm(2, -1, keepdim=True)
            hidden = torch.tanh(embedding @ w["model.0.weight"].T + w["model.0.bias"])
            prefix = (hidden @ w["model.2.weight"].T + w["model.2.bias"]).reshape(3, 4, 32)
        else:
            mapped = {name: tensor for name, tensor in w.items() if not name.startswith("gpt.")}
            prefix = torch.stack([papers_transformer(mapped, each, 8, 3) for each in embedding])
        gpt2: Any = GPT2LMHeadModel.from_pretrained(lm).eval()
        gpt2.load_state_dict({n[4:]: t for n, t in tensors.items() if n[4:] in gpt2.state_dict()})
        period = loaded.language.tokenizer.token_to_id(".")
        expected = gpt2.generate(
            inputs_embeds=prefix, attention_mask=torch.ones(3, 4), do_sample=False, max_new_tokens=8,
            eos_token_id=period, pad_token_id=period,
        )  # fmt: skip
    found = eager_captioner(loaded).caption(list(pixels), num_beams=1, max_new_tokens=8)
    for row, caption in zip(expected.tolist(), found, strict=True):
        assert list(caption.tokens) == (row[: row.index(period)] if period in row else row)
    assert len({caption.tokens for caption in found}) > 1


def test_files_that_do_not_fit_are_named(projecting: Path, clip_folder: Path, tmp_path: Path) -> None:
    lm = make_language_model(tmp_path / "lm", n_head=8)
    good = published(tmp_path / "good", lm)

    def refused(file: Path, *values: str, language_model: Path = lm, vision: Path = projecting) -> None:
        with pytest.raises(CheckpointError) as caught:
            import_checkpoint(
                file, tmp_path / "c", ImportOptions(language_model=str(language_model), vision=str(vision))
            )
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert all(value in message for value in (str(file), *values)), message
        assert not (tmp_path / "c").exists()

    refused(tmp_path / "absent.pt")
    refused(tmp_path)
    (tmp_path / "text.pt").write_text("no weights")
    refused(tmp_path / "text.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    refused(tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    refused(tmp_path / "broken.safetensors")
    with (tmp_path / "code.pt").open("wb") as evil:
        pickle.dump(subprocess.Popen, evil)
    refused(tmp_path / "code.pt")
    torch.save({"model": subprocess.run}, tmp_path / "call.pt")
    refused(tmp_path / "call.pt", "state_dict()")
    torch.save({"encoder.weight": torch.ones(2)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", "encoder.weight")
    torch.save({"clip_project.gate": torch.ones(2)}, tmp_path / "third.pt")
    refused(tmp_path / "third.pt", "clip_project.gate")
    wide = make_language_model(tmp_path / "wide", width=64)
    refused(good, "gpt.", "32]", "64]", "--language-model", language_model=wide)
    bare = published(tmp_path / "bare", lm, gpt=False)
    refused(bare, "clip_project.", "--language-model", language_model=wide)
    refused(good, "linear.weight", "20]", "24]", "--vision", vision=clip_folder)
    refused(published(tmp_path / "narrow", lm, width=21), "linear.weight", "21]", "24]", "--vision")
    tensors = torch.load(good, weights_only=True)
    del tensors["clip_project.transformer.layers.1.mlp.fc2.bias"]
    torch.save(tensors, tmp_path / "hole.pt")
    refused(tmp_path / "hole.pt", "clip_project.transformer.layers.1.mlp.fc2.bias")
    torch.save({"state_dict": tensors, 3: torch.ones(2)}, tmp_path / "nested.pt")
    refused(tmp_path / "nested.pt", "state_dict()")


@pytest.mark.parametrize(
    ("part", "change", "values"),
    [
        ("prefix_const", lambda t: t[0], ["prefix_const", "[32]"]),
        ("prefix_const", lambda t: t[:0], ["prefix_const", "[0, 32]"]),
        ("linear.weight", lambda _: torch.tensor(1.0), ["linear.weight"]),
        ("linear.weight", lambda t: t[:, :0], ["linear.weight", "[96, 0]"]),
        ("linear.weight", lambda t: t[:-1], ["linear.weight", "[95, 20]"]),
        ("linear.weight", lambda t: t.to_sparse(), ["linear.weight", "torch.sparse_coo"]),
        ("linear.weight", lambda t: t.to(torch.complex64), ["linear.weight", "torch.complex64"]),
        ("linear.weight", lambda t: t.to("meta"), ["linear.weight", "meta"]),
        ("prefix_const", lambda _: torch.zeros(1).expand(2**40, 32), ["prefix_const", "1099511627776"]),
        ("linear.weight", lambda t: torch.zeros(1).expand(2**40, *t.shape[1:]), ["linear.weight"]),
        ("linear.weight", lambda t: t.int(), ["linear.weight", "torch.int32"]),
        ("linear.bias", lambda t: t * float("nan"), ["linear.bias", "finite"]),
        ("fc1.bias", lambda t: t[:-1], ["layers.0.mlp.fc1.bias", "[63]", "[64]"]),
        (".layers.", None, ["clip_project.transformer.layers.0."]),
        ("h.1.mlp.c_fc.bias", lambda t: t * float("inf"), ["gpt.transformer.h.1.mlp.c_fc.bias", "finite"]),
    ],
)
def test_damaged_weights_are_named(
    part: str, change: Callable[[Tensor], Tensor] | None, values: list[str], projecting: Path, tmp_path: Path
) -> None:
    lm = make_language_model(tmp_path / "lm", n_head=8)
    tensors = torch.load(published(tmp_path / "good", lm), weights_only=True)
    for name in [name for name in tensors if part in name]:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name])
    torch.save(tensors, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(
            tmp_path / "damaged.pt", tmp_path / "c", ImportOptions(language_model=str(lm), vision=str(projecting))
        )
    assert all(value in str(caught.value) for value in ("damaged.pt", *values)), caught.value


def itune(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", f"itune.cli.{command}", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_command_lines(projecting: Path, records: list[Record], tmp_path: Path) -> None:
    """Train, export in int8, run and evaluate; then from a published checkpoint on."""
    lm = make_language_model(tmp_path / "lm", n_head=8)
    captions = tmp_path / "captions.jsonl"
    lines = [json.dumps({"image": str(r.image), "captions": r.captions, "split": "train"}) for r in records]
    captions.write_text("\n".join(lines), encoding="utf-8")
    run, photo = tmp_path / "run", records[0].image
    done = itune(
        "train", "--preset", "clipcap", "--data", captions, "--dev-fraction", "0.3", "--language-model", lm,
        "--vision", projecting, "--mapper", "mlp", "--prefix-length", 3, "--epochs", 1, "-o", run,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "bundle"
    done = itune("export", run, "--precision", "int8", "--no-verify", "-o", bundle)
    assert done.returncode == 0, done.stderr
    done = itune("run", photo, "--bundle", bundle, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["caption"]
    file = published(tmp_path / "p", lm)
    done = itune("export", "--import", file, "--language-model", lm, "--vision", projecting, "-o", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    done = itune("evaluate", tmp_path / "c", "--data", captions, "--split", "all")
    assert done.returncode == 0, done.stderr
    done = itune(
        "train", "--preset", "clipcap", "--data", captions, "--dev-fraction", "0.3", "--init-from", tmp_path / "c",
        "--epochs", 1, "-o", tmp_path / "tuned",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = load_config(tmp_path / "tuned" / "best").text
    assert (text.end, text.strip_period, text.begin) == (".", True, None)
