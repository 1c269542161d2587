"""The captioner in PyTorch: a frozen GPT-2 whose feed-forward blocks are joined by I-Tuning adapters.

This eager model is the reference that the exported graphs are verified against; `EagerEngine` drives it with
the same search as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GPT2LMHeadModel

from .adapter import AdapterConfig, ITuningAdapter
from .backbones import CACHE_ARGUMENT, LanguageModel, VisionTower, load_language_model, load_vision_tower
from .checkpoint import (
    WEIGHTS_FILE,
    CheckpointConfig,
    CheckpointError,
    atomic_path,
    find_checkpoint,
    load_config,
    resolve_source,
)
from .runtime.engines.base import Bool, Candidates, Int64, UInt8
from .runtime.search import NATIVE, top_k

KeysValues = dict[int, tuple[Tensor, Tensor]]


class ITuningModel(nn.Module):
    """A frozen language model with adapters on the decoder layers from `first_adapter_layer` up.

    Below the first adapter nothing needs a gradient, so autograd keeps no activations there (the paper's
    Dropping). The adapters hang on forward hooks: GPT-2 keeps its own parameter names and its own `generate`.
    """

    def __init__(self, language_model: GPT2LMHeadModel, config: AdapterConfig, first_adapter_layer: int = 0) -> None:
        super().__init__()
        blocks: Any = language_model.transformer.h
        if not 0 <= first_adapter_layer < len(blocks):
            raise CheckpointError(
                f"first adapter layer {first_adapter_layer} does not exist: "
                f"the language model has {len(blocks)} layers, numbered from 0"
            )
        self.config = config
        self.language_model = language_model.requires_grad_(False)
        self.adapters = nn.ModuleDict({str(i): ITuningAdapter(config) for i in range(first_adapter_layer, len(blocks))})
        self._visual: KeysValues | None = None
        for i in self.adapter_layers:
            blocks[i].mlp.register_forward_hook(self._add_adapter(i))
        self.train(False)

    @property
    def adapter_layers(self) -> list[int]:
        """The decoder layers that carry an adapter."""
        return [int(i) for i in self.adapters]

    def train(self, mode: bool = True) -> ITuningModel:
        """Training mode is the adapters'; the frozen language model never drops anything."""
        super().train(mode)
        self.language_model.train(False)
        return self

    def project(self, visual: Tensor) -> KeysValues:
        """K and U [images, N, r] of every adapted layer, for visual embeddings [images, N, d_v]."""
        return {i: self._adapter(i).project(visual) for i in self.adapter_layers}

    @contextmanager
    def looking_at(self, visual: KeysValues) -> Iterator[None]:
        """Within the block the language model sees these images; its rows are grouped by image."""
        self._visual = visual
        try:
            yield
        finally:
            self._visual = None

    def loss(self, input_ids: Tensor, mask: Tensor, visual: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Sum of the next-token cross-entropies of the caption and end tokens.

        input_ids [rows, T]: begin [prompt] caption end, right-padded; mask [rows, T]: True at tokens that are
        to be predicted; visual [images, N, d_v], rows grouped by image with equally many rows each.
        """
        with self.looking_at(self.project(visual)):
            hidden = self.language_model.transformer(input_ids=input_ids[:, :-1], use_cache=False)[0]
        targets = mask[:, 1:]
        # The head is the dearest product: only positions that are scored go through it.
        logits = self.language_model.lm_head(hidden[targets])
        return F.cross_entropy(
            logits.float(), input_ids[:, 1:][targets], label_smoothing=label_smoothing, reduction="sum"
        )

    def attention_entropy(self, input_ids: Tensor, mask: Tensor, visual: Tensor) -> float:
        """Mean entropy of the adapters' attention at scored positions, as a fraction of its maximum log N."""
        entropies: list[Tensor] = []
        keys_values = self.project(visual)

        def record(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                weights = self._adapter(layer).attention(inputs[0], keys_values[layer][0])
                entropy = torch.special.entr(weights).sum(-1).mean(1).reshape(inputs[0].shape[:2])
                entropies.append(entropy[mask[:, 1:]].mean())

            return hook

        blocks: Any = self.language_model.transformer.h
        hooks = [blocks[i].mlp.register_forward_pre_hook(record(i)) for i in self.adapter_layers]
        try:
            with torch.no_grad(), self.looking_at(keys_values):
                self.language_model.transformer(input_ids=input_ids[:, :-1], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return float(torch.stack(entropies).mean()) / float(np.log(visual.shape[1]))

    def adapter_state(self) -> dict[str, Tensor]:
        """The trainable weights under their checkpoint names, `layers.{i}.{query|key|value|output}.*`."""
        return {f"layers.{name}": weight for name, weight in self.adapters.state_dict().items()}

    def save_adapters(self, path: Path) -> None:
        """Write the trainable weights to a safetensors file, atomically."""
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.adapter_state().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def load_adapters(self, path: Path) -> None:
        """Read the trainable weights; a missing, surplus or misshapen tensor is named."""
        load_adapter_state(self, read_adapters(path), path)

    def _adapter(self, layer: int) -> ITuningAdapter:
        adapter = self.adapters[str(layer)]
        assert isinstance(adapter, ITuningAdapter)
        return adapter

    def _add_adapter(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self._visual is None:
                raise RuntimeError("call the language model within `looking_at(...)`: it has no image to see")
            delta: Tensor = self._adapter(layer)(inputs[0], *self._visual[layer])
            return output + delta

        return hook


def read_adapters(path: Path) -> dict[str, Tensor]:
    """The tensors of an `adapters.safetensors`."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged ({error}): copy the checkpoint again") from None


def load_adapter_state(model: ITuningModel, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Put tensors under their checkpoint names into the model's adapters."""
    expected = model.adapter_state()
    odd = sorted(expected.keys() ^ tensors.keys())
    if odd:
        state = "lacks" if odd[0] in expected else "has an unexpected"
        raise CheckpointError(f"{path} {state} tensor {odd[0]}: it does not fit the checkpoint's itune.json")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, itune.json asks for "
                f"{list(expected[name].shape)}"
            )
    model.adapters.load_state_dict({name.removeprefix("layers."): t for name, t in tensors.items()})


class LoadedCheckpoint:
    """A checkpoint with its frozen parts: `config`, `model`, `language` (tokenizer included) and `tower`."""

    def __init__(
        self, config: CheckpointConfig, model: ITuningModel, language: LanguageModel, tower: VisionTower
    ) -> None:
        self.config, self.model, self.language, self.tower = config, model, language, tower

    @classmethod
    def load(cls, folder: Path) -> LoadedCheckpoint:
        """Load a checkpoint folder, its language model and tower; hashes are held to `itune.json`."""
        folder = find_checkpoint(folder)
        config = load_config(folder)
        lm, vision = config.language_model, config.vision
        language = load_language_model(resolve_source(lm.source, folder), lm.revision)
        tower = load_vision_tower(resolve_source(vision.source, folder), vision.revision, image=config.image)
        for what, recorded, found in (
            ("language model", lm, language.sha256),
            ("vision tower", vision, tower.sha256),
        ):
            if recorded.sha256 not in (None, found):
                raise CheckpointError(
                    f"{folder}: the {what} at {recorded.source} is not the one that the adapters were "
                    f"trained with (its weights hash to {found[:12]}, itune.json says "
                    f"{str(recorded.sha256)[:12]})"
                )
        if (tower.tokens, tower.width) != (vision.tokens, vision.width):
            raise CheckpointError(
                f"{folder}: the vision tower gives {tower.tokens} x {tower.width} embeddings, "
                f"itune.json says {vision.tokens} x {vision.width}"
            )
        model = ITuningModel(language.model, adapter_config(config, language), config.first_adapter_layer)
        model.load_adapters(folder / WEIGHTS_FILE)
        return cls(config, model, language, tower)


def adapter_config(config: CheckpointConfig, language: LanguageModel) -> AdapterConfig:
    """The adapters' shape that a checkpoint describes."""
    return AdapterConfig(
        hidden_size=language.model.config.n_embd,
        visual_width=config.vision.width,
        bottleneck=config.bottleneck,
        heads=config.heads,
        lambda_=config.lambda_,
        score_scale=config.score_scale,
        dropout=float(config.training.get("dropout", 0.0)),
    )


class EagerState:
    """Visual keys/values of images, the rows' cache, and the rows' mask of real tokens."""

    def __init__(self, visual: KeysValues) -> None:
        self.visual = visual
        self.cache = DynamicCache()
        self.mask: Tensor | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return len(next(iter(self.visual.values()))[0])

    def keep(self, images: Int64) -> None:
        """Drop every image but these (see `State.keep`)."""
        index = torch.from_numpy(images)
        self.visual = {i: (k[index], u[index]) for i, (k, u) in self.visual.items()}


class EagerEngine:
    """The PyTorch model behind the engine protocol of `runtime.engines.base`."""

    def __init__(self, model: ITuningModel, tower: VisionTower, vocabulary: Int64 | None = None) -> None:
        """`vocabulary`: the ascending ids of the only tokens that may be written; None is all."""
        self.model, self.tower, self.vocabulary = model.train(False), tower, vocabulary

    @property
    def most_candidates(self) -> int:
        """See `Engine.most_candidates`."""
        return len(self.vocabulary) if self.vocabulary is not None else self.model.language_model.config.vocab_size

    @torch.inference_mode()
    def encode(self, pixels: UInt8) -> EagerState:
        """Images, uint8 [B, H, W, 3], to their keys/values."""
        return self.encode_features(self.tower.embed(pixels))

    @torch.inference_mode()
    def encode_features(self, visual: Tensor) -> EagerState:
        """Visual embeddings [B, N, d_v] (computed before, or from a feature cache) to their keys/values."""
        return EagerState(self.model.project(visual.to(self._device, self._dtype)))

    @torch.inference_mode()
    def step(self, tokens: Int64, parents: Int64, state: EagerState, k: int, *, mask: Bool | None = None) -> Candidates:
        """One step of the language model (see `Engine.step`)."""
        input_ids = torch.from_numpy(tokens).to(self._device)
        rows: Any = torch.from_numpy(parents).to(self._device)
        real = torch.ones_like(input_ids) if mask is None else torch.from_numpy(mask).to(input_ids)
        if state.mask is not None:
            state.cache.reorder_cache(rows)
            real = torch.cat([state.mask[rows], real], dim=1)
        state.mask = real
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        with self.model.looking_at(state.visual):
            logits: Any = self.model.language_model(
                input_ids,
                attention_mask=real,
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{CACHE_ARGUMENT: state.cache},
            ).logits
        logits = logits[:, -1].float()
        if self.vocabulary is None:
            return candidates(logits, k)
        found = candidates(logits[:, self.vocabulary], k)
        return found._replace(token_ids=self.vocabulary[found.token_ids])

    @property
    def _device(self) -> torch.device:
        return self.model.language_model.device

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.adapters.parameters()).dtype


def candidates(logits: Tensor, k: int) -> Candidates:
    """The k largest of logits [rows, vocabulary] with their log-sum-exp; ties in order of the token id."""
    if NATIVE and logits.is_cpu:  # the same in a quarter of the time
        return top_k(logits.numpy(), k)
    k = min(k, logits.shape[1])
    values, ids = logits.topk(k)
    threshold = values[:, -1:]
    if ((logits == threshold).sum(1) > (values == threshold).sum(1)).any():
        # topk chose freely among equals at the threshold; a stable sort takes the lowest ids.
        values, ids = (t[:, :k] for t in logits.sort(dim=1, descending=True, stable=True))
    order = np.lexsort((ids.cpu().numpy(), -values.cpu().numpy()), axis=1)
    take = torch.from_numpy(order).to(values.device)
    return Candidates(
        values.gather(1, take).cpu().numpy(),
        ids.gather(1, take).cpu().numpy(),
        logits.logsumexp(1).cpu().numpy(),
    )
