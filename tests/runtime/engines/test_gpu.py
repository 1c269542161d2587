"""Tests that need a GPU: `pytest -m gpu` builds real plans for the GPU here and runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from itune import Captioner
from itune.runtime.bundle import Bundle
from itune.runtime.caption import Caption
from itune.runtime.engines.cuda import CudaDevice
from itune.runtime.engines.onnxruntime import OnnxRuntimeEngine, has_cuda
from itune.runtime.engines.tensorrt import TensorRTEngine
from itune.runtime.errors import EngineError

pytestmark = pytest.mark.gpu
# Differences of logits, in their standard deviations: the same graph, summed in another order and in fewer bits.
LIMITS = {"fp32": 5e-3, "fp16": 0.05, "int8": 0.2}
MAX_BATCH = 4


@pytest.fixture(scope="module")
def gpu() -> str:
    """The compute capability of the GPU here."""
    try:
        return CudaDevice().capability
    except EngineError as error:
        pytest.skip(f"needs a GPU: {error}")


@pytest.fixture(scope="module", params=LIMITS)
def plans(request, gpu, checkpoint_folder, photos, tmp_path_factory) -> tuple[Path, str]:
    """A bundle with plans for this GPU, and its precision."""
    folder = tmp_path_factory.mktemp("gpu") / request.param
    command = ["-m", "itune.cli.export", checkpoint_folder, "--target", "tensorrt", "--precision", request.param]
    limits = ["--gpu", gpu, "--max-batch", MAX_BATCH, "--max-beams", 5, "--max-new-tokens", 16, "-o", folder]
    calibration = ["--calibration-data", photos[0].parent] if request.param == "int8" else []
    arguments = [str(each) for each in (*command, *limits, *calibration)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, request.param


@pytest.fixture(scope="module")
def captioner(plans) -> Captioner:
    captioner = Captioner.load(plans[0])
    assert captioner.engine_name == "tensorrt", "auto"
    return captioner


def test_every_step_equals_onnx_runtime(plans):
    """The candidates of each step on the same tokens: two parts of a state, prompts, images that finish."""
    bundle, limit = Bundle.load(plans[0]), LIMITS[plans[1]]
    engines = TensorRTEngine.load(bundle), OnnxRuntimeEngine.load(bundle)
    rng = np.random.default_rng(0)
    images, beams, k = MAX_BATCH + 2, 3, 12
    pixels = rng.integers(0, 256, (images, 32, 32, 3), np.uint8)
    states = [engine.encode(pixels) for engine in engines]
    tokens, parents, rows = rng.integers(0, 200, (images, 1)), np.arange(images), 1
    for kept in (range(images), [0, 2, 3, 4, 5], [1, 3], [0], [0]):
        found, expected = (
            engine.step(tokens, parents, state, k) for engine, state in zip(engines, states, strict=True)
        )
        spread = expected.logits.std()
        np.testing.assert_allclose(found.logits, expected.logits, atol=limit * spread)
        np.testing.assert_allclose(found.logsumexp, expected.logsumexp, atol=limit * spread)
        for state in states:
            state.keep(np.array(kept))
        parents = np.repeat(kept, beams) * rows + rng.integers(0, rows, len(kept) * beams)
        tokens, rows = rng.integers(0, 200, (len(parents), 1)), beams


def agree(found: list[Caption], expected: list[Caption], precision: str) -> None:
    """Other shapes have other kernels: in few bits, nearly equal tokens may change places."""
    same = sum(a.tokens == b.tokens for a, b in zip(found, expected, strict=True))
    assert same >= len(expected) - (0 if precision == "fp32" else 2)


@pytest.mark.parametrize("num_beams", [1, 5])
def test_captions_are_those_of_onnx_runtime(num_beams, captioner, plans, photos):
    options = {"num_beams": num_beams, "max_new_tokens": 12, "batch_size": 6}
    expected = Captioner.load(plans[0], engine="onnxruntime").caption(photos, **options)
    found = captioner.caption(photos, **options)
    assert len({caption.tokens for caption in expected}) > 1
    agree(found, expected, plans[1])


def test_alone_or_in_company_and_again(captioner, plans, photos):
    options = {"num_beams": 3, "max_new_tokens": 12}
    together = captioner.caption(photos, batch_size=MAX_BATCH, **options)
    for _ in range(2):  # the second time in buffers that were used before
        alone = [captioner.caption(photo, **options) for photo in photos]
        agree(alone, together, plans[1])


def test_cuda_graphs_change_nothing(captioner, plans, photos):
    options = {"num_beams": 3, "max_new_tokens": 12}
    expected = captioner.caption(photos, **options)
    replayed = Captioner.load(plans[0], engine="tensorrt")
    replayed.engine = TensorRTEngine.load(Bundle.load(plans[0]), cuda_graphs=True)
    for _ in range(3):  # captured, and replayed
        agree(replayed.caption(photos, **options), expected, plans[1])


def test_onnx_runtime_on_cuda(gpu, plans, photos):
    if not has_cuda():
        pytest.skip("needs onnxruntime-gpu in place of onnxruntime")
    options = {"num_beams": 5, "max_new_tokens": 12}
    found = Captioner.load(plans[0], engine="onnxruntime-cuda").caption(photos, **options)
    expected = Captioner.load(plans[0], engine="onnxruntime").caption(photos, **options)
    agree(found, expected, plans[1])
