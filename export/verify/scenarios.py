"""What the verification plays on both sides: images, prompts of several lengths, beams that change places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import TokenSettings
from ...runtime.engines.base import Candidates, Engine, Int64, UInt8
from ...runtime.engines.onnxruntime import OnnxRuntimeState
from ...runtime.errors import ItuneError
from ...runtime.image import SUFFIXES, decode, preprocess
from ...runtime.settings import ImageSettings

if TYPE_CHECKING:  # the side that runs the graphs does without torch
    from ...eager import EagerState

Array = NDArray[Any]
_STEPS = 4
_PHOTOS = 8
# Name, images, beams, and how many tokens each image's prompt has more than usual: prompts differ in length.
_PLAN = (
    ("1 image", [0], 1, [0]),
    ("3 images, 3 beams", [0, -3, -1], 3, [0, 0, 0]),
    ("3 images, 3 prompts", [-1, 0, -2], 1, [2, 0, 5]),
    ("2x3 beams, 2 prompts", [1, -2], 3, [3, 4]),
)


@dataclass(frozen=True)
class Step:
    """The inputs of a decoder step (see `Engine.step`), in JSON's types."""

    tokens: list[list[int]]
    parents: list[int]
    mask: list[list[bool]] | None = None


@dataclass(frozen=True)
class Scenario:
    """Some of the images, decoded together for some steps."""

    name: str
    images: list[int]
    steps: list[Step]

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Scenario:
        """Read what `dataclasses.asdict` made."""
        return cls(content["name"], content["images"], [Step(**step) for step in content["steps"]])


def pick_images(settings: ImageSettings, folder: Path | None = None) -> UInt8:
    """Pixels [at least 4, H, W, 3]: the photos of `folder`, then a gradient, noise, dark noise, loud stripes.

    Raises:
        ItuneError: the folder has no photo.
    """
    height, width = settings.output_size
    images: list[Array] = []
    if folder is not None:
        photos = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)[:_PHOTOS]
        if not photos:
            raise ItuneError(f"--images {folder}: there is no photo in it")
        images += [preprocess(decode(path), settings) for path in photos]
    y, x = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3))
    stripes = 255 * (np.arange(width) // 8 % 2)[None, :, None] + np.zeros((height, 1, 3))
    images += [np.stack([x, y, 255 - x], axis=-1), noise[0], noise[1] // 4, stripes]
    return np.stack(images).astype(np.uint8)


def record(engine: Engine[Any], pixels: UInt8, tokens: TokenSettings, vocabulary: Int64) -> list[Scenario]:
    """Let the engine choose the tokens of all scenarios: likely ones, as a search would feed them."""
    rng = np.random.default_rng(1)
    return [
        _record(engine, pixels, name, images, beams, _prompts(tokens, vocabulary, extra, rng))
        for name, images, beams, extra in _PLAN
    ]


def replay(engine: Engine[Any], pixels: UInt8, scenario: Scenario, vocabulary: Int64) -> dict[str, Array]:
    """All outputs by name, those of a step as `NAME/step`: visual.*, logits in order of the vocabulary, present.*.

    `vocabulary`: the ascending ids of all tokens that the engine can write. Visual keys and values come as
    [images, N, r]; padded positions of the cache are zero.

    Raises:
        ItuneError: the engine's candidates are not the vocabulary.
    """
    state = engine.encode(pixels[scenario.images])
    results = _visual(state)
    for i, step in enumerate(scenario.steps):
        found = _run(engine, state, step, len(vocabulary))
        order = np.argsort(found.token_ids, axis=1)
        token_ids = np.take_along_axis(found.token_ids, order, axis=1)
        if not np.array_equal(token_ids, np.tile(vocabulary, (len(token_ids), 1))):
            raise ItuneError("token_ids: asked for the whole vocabulary, the decoder returns other tokens")
        logits = np.take_along_axis(found.logits, order, axis=1)
        results |= {f"logits/{i}": logits, f"logsumexp/{i}": found.logsumexp}
    return results | _cache(state)


def beside_loud_image(scenario: Scenario, vocabulary: Int64) -> Scenario:
    """The scenario of one image and beam with the loud image beside it (its row is the second)."""
    steps = []
    for step in scenario.steps:
        places = np.searchsorted(vocabulary, step.tokens[0])
        others = vocabulary[(7 * places + 13) % len(vocabulary)]
        others = np.where(step.tokens[0] > vocabulary[-1], step.tokens[0], others)  # a prefix stays one
        steps.append(Step([others.tolist(), *step.tokens], [0, 1]))
    return Scenario("beside a loud image", [-1, *scenario.images], steps)


def _record(
    engine: Engine[Any], pixels: UInt8, name: str, images: list[int], beams: int, prompts: list[list[int]]
) -> Scenario:
    state = engine.encode(pixels[images])
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = [prompt[:1] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[False] * pad + [True] * (longest - pad) for pad in padding]
    step = Step(tokens, list(range(len(images))), mask if any(padding) else None)
    steps = [step]
    rng = np.random.default_rng(2)
    while len(steps) < _STEPS:
        best = _run(engine, state, step, beams + 1).token_ids
        if len(steps) == 1:  # every image's row becomes its beams
            parents = np.repeat(np.arange(len(images)), beams)
            chosen = best[:, :beams].reshape(-1)
        else:
            parents = np.concatenate([i * beams + rng.permutation(beams) for i in range(len(images))])
            chosen = best[parents, rng.integers(0, 2, len(parents))]
        step = Step(chosen[:, None].tolist(), parents.tolist())
        steps.append(step)
    return Scenario(name, images, steps)


def _prompts(
    tokens: TokenSettings, vocabulary: Int64, extra: Sequence[int], rng: np.random.Generator
) -> list[list[int]]:
    room = tokens.max_positions - _STEPS - len(tokens.prompt_tokens)
    lengths = [max(0, min(length, room)) for length in extra]
    return [[*tokens.prompt_tokens, *rng.choice(vocabulary, length).tolist()] for length in lengths]


def _run(engine: Engine[Any], state: Any, step: Step, k: int) -> Candidates:
    mask = None if step.mask is None else np.array(step.mask)
    return engine.step(np.array(step.tokens), np.array(step.parents), state, k, mask=mask)


def _visual(state: EagerState | OnnxRuntimeState) -> dict[str, Array]:
    if isinstance(state, OnnxRuntimeState):
        return {name: _join_heads(name, value.numpy()) for name, value in state.visual.items()}
    return {f"visual.{name}": tensor.numpy() for name, tensor in state.visual.items()}


def _join_heads(name: str, array: Array) -> Array:
    if array.ndim == 3:  # a prefix has no heads
        return array
    by_token = array.transpose(0, 3, 1, 2) if name.endswith("keys") else array.transpose(0, 2, 1, 3)
    return by_token.reshape(*by_token.shape[:2], -1)


def _cache(state: EagerState | OnnxRuntimeState) -> dict[str, Array]:
    if isinstance(state, OnnxRuntimeState):
        arrays = {
            name.replace("past_key_values", "present"): value.numpy()[: state.rows]
            for name, value in state.past.items()
        }
    else:
        layers: Any = state.cache.layers
        arrays = {
            f"present.{i}.{part}": getattr(layer, f"{part}s").numpy()
            for i, layer in enumerate(layers)
            for part in ("key", "value")
        }
    rows = len(next(iter(arrays.values())))
    real = np.asarray(state.mask)[:rows, None, :, None] != 0
    return {name: np.where(real, array, 0) for name, array in arrays.items()}
