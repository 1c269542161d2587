"""Tiny random models in the real Hugging Face format, and where the real photos are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from itune.data.records import Record
    from itune.loading import LoadedCheckpoint

pytest_plugins = ["tests.export.fixtures", "tests.runtime.fixtures"]

# Two processes with two threads each would fight over two cores.
torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
CAPTIONS = [
    "A dog runs through the grass .",
    "Two children play on a red swing .",
    "A man in a blue shirt is riding a bicycle .",
    "A woman is standing on the left side of a street .",
    "Three people are sitting at a table with food .",
    "A black cat sleeps on a sofa .",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `pytest -n 2 --dist loadfile` the tests of a file stay in one process, since they share expensive fixtures.

    So do all tests of the benchmarks: their files share one run.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "tests/benchmarks" if file.startswith("tests/benchmarks/") else file

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random GPT-2 base with CLIP ViT-B/16 and adapters, as the latency benchmark makes them; for slow tests."""
    from benchmarks.random_init import GEOMETRIES, build_checkpoint

    return build_checkpoint(GEOMETRIES["base"], tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with Flickr8k and the reference scores; tests that need it are skipped without it."""
    folder = Path(os.environ.get("ITUNE_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder} (set ITUNE_DATA)")
    return folder


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level BPE tokenizer like GPT-2's, with a small vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_language_model(folder: Path, *, layers: int = 3, width: int = 32, seed: int = 0, **config: object) -> Path:
    """A random GPT-2 folder; its weights are large, so its candidates' scores are far apart."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = make_tokenizer(folder)
    end = tokenizer.token_to_id("<|endoftext|>")
    torch.manual_seed(seed)
    values = {
        "vocab_size": tokenizer.get_vocab_size(),
        "n_positions": 64,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 4,
        "bos_token_id": end,
        "eos_token_id": end,
        "initializer_range": 0.2,
    }
    GPT2LMHeadModel(GPT2Config(**(values | config))).save_pretrained(folder)
    return folder


def make_clip(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """A random CLIP vision folder with its preprocessor configuration: 32 x 32 pixels, 17 embeddings of 24."""
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(seed)
    values = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    CLIPVisionModel(CLIPVisionConfig(**(values | config))).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_full_clip(folder: Path, *, seed: int = 0) -> Path:
    """A random CLIP with both towers, projections of width 20, and a tokenizer of single letters."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {"vocab_size": len(words), "max_position_embeddings": 40, "bos_token_id": len(words) - 2}
    text |= {"eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, **text, "hidden_size": 32, "intermediate_size": 64},
            vision_config={**sizes, "hidden_size": 24, "intermediate_size": 48, "image_size": 32, "patch_size": 8},
            projection_dim=20,
        )
    )
    with torch.no_grad():  # initialized as ones and zeros, the norm would not be tested
        for weight in model.vision_model.post_layernorm.parameters():
            weight.add_(torch.randn(weight.shape) * 0.3)
        for projection in (model.visual_projection, model.text_projection):
            projection.weight.normal_()
    model.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def make_checkpoint(
    folder: Path,
    language_model: Path,
    vision: Path,
    *,
    bottleneck: int = 16,
    heads: int = 1,
    lambda_: float = 1.0,
    first_adapter_layer: int = 0,
    prompt: str = "",
    seed: int = 0,
) -> Path:
    """An adapter checkpoint with random weights and biases, large enough for captions to depend on the image."""
    from itune.backbones import load_language_model, load_vision_tower
    from itune.checkpoint import WEIGHTS_FILE, ModelSource, VisionSource, save_config
    from itune.methods.ituning.model import AdapterConfig, ITuningModel
    from itune.methods.ituning.settings import ITuningCheckpoint
    from itune.runtime.settings import TextSettings

    language, tower = load_language_model(str(language_model)), load_vision_tower(str(vision))
    config = AdapterConfig(language.model.config.n_embd, tower.width, bottleneck, heads, lambda_)
    model = ITuningModel(language.model, config, first_adapter_layer)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.adapters.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * (0.5 if weight.ndim > 1 else 0.2))
    model.save_adapters(folder / WEIGHTS_FILE)
    assert config.score_scale is not None
    save_config(
        ITuningCheckpoint(
            language_model=ModelSource.of_language_model(language, str(language_model), folder),
            vision=VisionSource.of_tower(tower, str(vision), folder),
            bottleneck=bottleneck,
            heads=heads,
            lambda_=lambda_,
            score_scale=config.score_scale,
            first_adapter_layer=first_adapter_layer,
            image=tower.image,
            text=TextSettings(prompt=prompt),
        ),
        folder,
    )
    return folder


def random_photo(seed: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """A photo-like image: coarse random colours, smoothly enlarged."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def language_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2."""
    return make_language_model(tmp_path_factory.mktemp("models") / "language-model")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP vision tower."""
    return make_clip(tmp_path_factory.mktemp("models") / "vision")


@pytest.fixture(scope="session")
def records(photos: list[Path]) -> list[Record]:
    """Five photos with two captions each, for test files without records of their own."""
    from itune.data.records import Record

    return [Record(path, (CAPTIONS[i], CAPTIONS[i + 1]), path.stem) for i, path in enumerate(photos[:5])]


@pytest.fixture(scope="session")
def projecting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with its projection, of width 20."""
    from tests.clipcap import make_projecting_clip

    return make_projecting_clip(tmp_path_factory.mktemp("models") / "projecting")


@pytest.fixture(scope="session")
def full_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP with its text tower."""
    return make_full_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory, language_model_folder: Path, clip_folder: Path) -> Path:
    """A tiny random adapter checkpoint."""
    return make_checkpoint(
        tmp_path_factory.mktemp("models") / "checkpoint", language_model_folder, clip_folder, heads=2, lambda_=2.5
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Six random photos."""
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"photo{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        random_photo(i).save(path)
    return paths


@contextmanager
def refused(error: type[Exception], *values: object) -> Iterator[None]:
    """The block raises `error`, whose message names the offending values."""
    with pytest.raises(error) as caught:
        yield
    for value in values:
        assert str(value) in str(caught.value)


def assert_same_weights(found: LoadedCheckpoint, expected: LoadedCheckpoint) -> None:
    """The language model and the adapters have the same weights."""
    for new, old in (
        (found.language.model.state_dict(), expected.language.model.state_dict()),
        (found.model.adapter_state(), expected.model.adapter_state()),
    ):
        assert old.keys() == new.keys()
        for name in old:
            np.testing.assert_allclose(new[name], old[name], rtol=3e-7, err_msg=name)
