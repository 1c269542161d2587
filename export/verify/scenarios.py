"""The scenarios that both sides run: images, prompts of different lengths, and beams that change places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...runtime.bundle import TokenSettings
from ...runtime.captioner import Captioner
from ...runtime.engines.base import Candidates, Engine, Int64, UInt8
from ...runtime.engines.onnxruntime import OnnxRuntimeState
from ...runtime.errors import ItuneError
from ...runtime.graph_names import PAST, PRESENT, VISUAL
from ...runtime.image import SUFFIXES, decode, preprocess
from ...runtime.settings import ImageSettings, SearchDefaults, Settings
from .captions import Written

if TYPE_CHECKING:  # the compare side runs without torch
    from ...eager import EagerState

REFERENCE = "reference.json"
CAPTION_BEAMS = (1, 3)
Array = NDArray[Any]
_CAPTION_TOKENS = 16
_STEPS = 4
_PHOTOS = 8
# Name, images, beams, and the number of extra prompt tokens of each image.
_PLAN = (
    ("1 image", [0], 1, [0]),
    ("3 images, 3 beams", [0, -3, -1], 3, [0, 0, 0]),
    ("3 images, 3 prompts", [-1, 0, -2], 1, [2, 0, 5]),
    ("2x3 beams, 2 prompts", [1, -2], 3, [3, 4]),
)


class Step(Settings):
    """The inputs of `Engine.step`."""

    tokens: list[list[int]]
    parents: list[int]
    mask: list[list[bool]] | None = None

    def run(self, engine: Engine[Any], state: Any, k: int) -> Candidates:
        """Run the step; returns the `k` best tokens of each row."""
        mask = None if self.mask is None else np.array(self.mask)
        return engine.step(np.array(self.tokens), np.array(self.parents), state, k, mask=mask)


class Scenario(Settings):
    """Some of the images, decoded together for a few steps."""

    name: str
    images: list[int]
    steps: list[Step]


class Reference(Settings):
    """What the reference side passes to the compare side, besides arrays."""

    scenarios: list[Scenario]
    captions: list[list[Written]]
    """A list for each of CAPTION_BEAMS, with every image's caption."""
    dev: dict[str, Written]


def pick_images(settings: ImageSettings, folder: Path | None = None) -> UInt8:
    """Pixels [at least 4, H, W, 3]: photos of `folder`, then a gradient, noise, dark noise and loud stripes."""
    height, width = settings.output_size
    images: list[Array] = []
    if folder is not None:
        photos = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)[:_PHOTOS]
        if not photos:
            raise ItuneError(f"--images {folder}: the folder has no photo")
        images += [preprocess(decode(path), settings) for path in photos]
    y, x = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    noise = np.random.default_rng(0).integers(0, 256, (2, height, width, 3))
    stripes = 255 * (np.arange(width) // 8 % 2)[None, :, None] + np.zeros((height, 1, 3))
    images += [np.stack([x, y, 255 - x], axis=-1), noise[0], noise[1] // 4, stripes]
    return np.stack(images).astype(np.uint8)


def caption_images(captioner: Captioner, pixels: UInt8) -> list[list[Written]]:
    """Caption every image with each of CAPTION_BEAMS, whatever search defaults the captioner has."""
    options = SearchDefaults(max_new_tokens=min(_CAPTION_TOKENS, captioner.tokens.room)).model_dump()
    found = (captioner.caption(list(pixels), **options | {"num_beams": beams}) for beams in CAPTION_BEAMS)
    return [[Written.of(caption) for caption in captions] for captions in found]


def record(engine: Engine[Any], pixels: UInt8, tokens: TokenSettings, vocabulary: Int64) -> list[Scenario]:
    """Choose the tokens of all scenarios: those that `engine` finds likely, as in a search."""
    rng = np.random.default_rng(1)
    room = tokens.max_positions - _STEPS - len(tokens.prompt_tokens)
    scenarios = []
    for name, images, beams, extra in _PLAN:
        lengths = [max(0, min(length, room)) for length in extra]
        prompts = [[*tokens.prompt_tokens, *rng.choice(vocabulary, length).tolist()] for length in lengths]
        steps = _record(engine, engine.encode(pixels[images]), beams, prompts)
        scenarios.append(Scenario(name=name, images=images, steps=steps))
    return scenarios


def _record(engine: Engine[Any], state: Any, beams: int, prompts: Sequence[list[int]]) -> list[Step]:
    longest, images = max(map(len, prompts)), np.arange(len(prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = [prompt[:1] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[False] * pad + [True] * (longest - pad) for pad in padding]
    steps = [Step(tokens=tokens, parents=images.tolist(), mask=mask if any(padding) else None)]
    rng = np.random.default_rng(2)
    while len(steps) < _STEPS:
        best = steps[-1].run(engine, state, beams + 1).token_ids
        if len(steps) == 1:  # every image's row becomes its beams
            parents = np.repeat(images, beams)
            chosen = best[:, :beams].reshape(-1)
        else:
            parents = np.concatenate([i * beams + rng.permutation(beams) for i in images])
            chosen = best[parents, rng.integers(0, 2, len(parents))]
        steps.append(Step(tokens=chosen[:, None].tolist(), parents=parents.tolist()))
    return steps


def replay(engine: Engine[Any], pixels: UInt8, scenario: Scenario, vocabulary: Int64) -> dict[str, Array]:
    """All outputs of a scenario by name, those of a step as `NAME/step`.

    `vocabulary` has the ascending ids of all tokens that the engine can write; logits are in this order. Visual keys
    and values are [images, N, r]. Padded positions of the cache are zero.

    Raises:
        ItuneError: the engine's candidates are other tokens.
    """
    state = engine.encode(pixels[scenario.images])
    results = _visual(state)
    for i, step in enumerate(scenario.steps):
        found = step.run(engine, state, len(vocabulary))
        order = np.argsort(found.token_ids, axis=1)
        token_ids = np.take_along_axis(found.token_ids, order, axis=1)
        if not np.array_equal(token_ids, np.tile(vocabulary, (len(order), 1))):
            raise ItuneError("token_ids: the decoder's candidates are not the whole vocabulary")
        logits = np.take_along_axis(found.logits, order, axis=1)
        results |= {f"logits/{i}": logits, f"logsumexp/{i}": found.logsumexp}
    return results | _cache(state)


def beside_loud_image(scenario: Scenario, vocabulary: Int64) -> Scenario:
    """A scenario of one image and one beam with the loud image in the row before it."""
    steps = []
    for step in scenario.steps:
        places = np.searchsorted(vocabulary, step.tokens[0])
        others = vocabulary[(7 * places + 13) % len(vocabulary)]
        others = np.where(step.tokens[0] > vocabulary[-1], step.tokens[0], others)  # ids of a visual prefix stay
        steps.append(Step(tokens=[others.tolist(), *step.tokens], parents=[0, 1]))
    return Scenario(name="beside a loud image", images=[-1, *scenario.images], steps=steps)


def _visual(state: EagerState | OnnxRuntimeState) -> dict[str, Array]:
    if isinstance(state, OnnxRuntimeState):
        return {name: _join_heads(name, value.numpy()) for name, value in state.visual.items()}
    return {f"{VISUAL}{name}": tensor.numpy() for name, tensor in state.visual.items()}


def _join_heads(name: str, array: Array) -> Array:
    if array.ndim == 3:  # a prefix has no heads
        return array
    by_token = array.transpose(0, 3, 1, 2) if name.endswith("keys") else array.transpose(0, 2, 1, 3)
    return by_token.reshape(*by_token.shape[:2], -1)


def _cache(state: EagerState | OnnxRuntimeState) -> dict[str, Array]:
    if isinstance(state, OnnxRuntimeState):
        arrays = {name.replace(PAST, PRESENT): value.numpy()[: state.rows] for name, value in state.past.items()}
    else:
        layers: Any = state.cache.layers
        arrays = {
            f"{PRESENT}{i}.{part}": getattr(layer, f"{part}s").numpy()
            for i, layer in enumerate(layers)
            for part in ("key", "value")
        }
    rows = len(next(iter(arrays.values())))
    real = np.asarray(state.mask)[:rows, None, :, None] != 0
    return {name: np.where(real, array, 0) for name, array in arrays.items()}
