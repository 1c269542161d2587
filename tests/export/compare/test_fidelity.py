from __future__ import annotations

import numpy as np
import pytest
import torch

from itune.eager import EagerEngine
from itune.export.compare.fidelity import measure_fidelity
from itune.loading import LoadedCheckpoint, eager_captioner

CAPTIONS = [[70, 80, 301, 9], [44], [12, 13, 14, 15, 16, 17], [], [301, 302, 303]]


@pytest.fixture(scope="module")
def loaded(onnx_checkpoint):
    """With a prompt."""
    return LoadedCheckpoint.load(onnx_checkpoint)


@pytest.fixture(scope="module")
def tokens(loaded):
    return eager_captioner(loaded).tokens


@pytest.fixture(scope="module")
def noisy(onnx_checkpoint):
    """The same model, with noise in its weights."""
    model = LoadedCheckpoint.load(onnx_checkpoint).model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.03 * torch.randn(weight.shape, generator=generator)
    return model


@torch.no_grad()
def log_probs(model, loaded, pixels, caption, tokens):
    """Of every next token after the prompt, from one pass over the whole caption: [len(caption) + 1, vocabulary]."""
    read = [tokens.begin, *tokens.prompt, *caption]
    with model.looking_at(model.project(loaded.tower.embed(pixels[None]))):
        logits = model.language_model(torch.tensor([read])).logits[0]
    return logits[len(tokens.prompt) :].double().log_softmax(-1)


@pytest.mark.parametrize("shortlist", [False, True])
def test_fidelity_equals_one_pass_over_the_captions(shortlist, loaded, noisy, tokens, pixels):
    vocabulary = np.array([*range(0, 60), 70, 80, 95, 302, *tokens.prompt]) if shortlist else None
    if vocabulary is not None:
        vocabulary = np.unique(vocabulary)
    found = measure_fidelity(
        EagerEngine(loaded.model, loaded.tower),
        EagerEngine(noisy, loaded.tower, vocabulary),
        list(zip(pixels, CAPTIONS, strict=False)),
        tokens,
    )
    kls, same, covered = [], [], []
    for image, caption in zip(pixels, CAPTIONS, strict=False):
        if vocabulary is not None and (unknown := [i for i, t in enumerate(caption) if t not in vocabulary]):
            caption = caption[: unknown[0]]
        p, q = (log_probs(model, loaded, image, caption, tokens) for model in (loaded.model, noisy))
        best = p.argmax(-1)
        if vocabulary is not None:
            p, q = p[:, vocabulary], q[:, vocabulary]
            covered += p.exp().sum(-1).tolist()
            p, q = p.log_softmax(-1), q.log_softmax(-1)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        own = q.argmax(-1) if vocabulary is None else torch.from_numpy(vocabulary)[q.argmax(-1)]
        same += (best == own).tolist()
    assert found.positions == len(kls) == (14 if shortlist else 19)
    assert found.kl == pytest.approx(np.mean(kls), rel=1e-4)
    assert found.kl > 0.003
    assert found.top1 == np.mean(same) < 1
    if shortlist:
        assert found.covered == pytest.approx(np.mean(covered), rel=1e-5)
        assert found.covered < 0.9
    else:
        assert found.covered == 1


def test_a_model_agrees_with_itself(loaded, tokens, pixels):
    engine = EagerEngine(loaded.model, loaded.tower)
    stages = []
    examples = [(pixels[i % len(pixels)], [5, 6]) for i in range(20)]
    found = measure_fidelity(engine, engine, examples, tokens, progress=lambda *state: stages.append(state))
    assert (found.top1, found.covered, found.positions) == (1, 1, 60)
    assert abs(found.kl) < 1e-12
    assert stages == [(16, 20), (20, 20)]
