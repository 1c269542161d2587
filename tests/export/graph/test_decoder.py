from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from itune.export.graph.builder import Graph
from itune.export.methods.registry import build_decoder
from itune.loading import LoadedCheckpoint
from itune.methods.ituning.model import AdapterConfig, ITuningModel
from itune.runtime.engines.onnxruntime import open_session
from itune.runtime.errors import ItuneError

VOCABULARY, WIDTH, LAYERS = 53, 24, 4


def random_model(heads: int = 1, first: int = 0, **config: object) -> ITuningModel:
    torch.manual_seed(0)
    shape = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    model = ITuningModel(
        GPT2LMHeadModel(GPT2Config(**(shape | config))), AdapterConfig(WIDTH, 20, 12, heads, 2.5), first
    )
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return model


def products(graph: Graph) -> int:
    """Products with a weight, which are what a step's time goes to."""
    return sum(n.op_type in ("MatMul", "Gemm") and n.input[1] in graph.weights for n in graph.nodes)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("heads", [1, 3])
def test_an_adapted_layer_costs_no_product_more_than_plain_gpt2(heads, first):
    graph = build_decoder(random_model(heads, first))
    assert products(graph) == 4 * LAYERS + 1
    visual = {i.name for i in graph.inputs if i.name.startswith("visual.")}
    assert visual == {f"visual.{i}.{part}" for i in range(first, LAYERS) for part in ("keys", "values")}


def test_standard_operators_with_consistent_shapes(tmp_path):
    path = tmp_path / "decoder.onnx"
    build_decoder(random_model(heads=2, first=1)).save(path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""}
    layers = range(LAYERS)
    assert [o.name for o in model.graph.output] == [
        *(f"present.{i}.{part}" for i in layers for part in ("key", "value")),
        "logits",
        "token_ids",
        "logsumexp",
    ]


@pytest.mark.parametrize("config", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}])
@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 4), (5, 1)])
def test_the_fused_attention_computes_what_the_standard_operators_do(past, length, config, tmp_path):
    model, rng, rows = random_model(heads=2, n_head=3, **config), np.random.default_rng(0), 6
    real = np.ones((rows, past + length), np.bool_)
    real[1::2, : (past + length) // 2] = False  # shorter prompts, padded on the left
    positions = np.maximum(real.cumsum(axis=1) - 1, 0)[:, past:]
    inputs = {"tokens": rng.integers(0, VOCABULARY, (rows, length)), "positions": positions, "mask": real}
    inputs |= {"parents": np.arange(rows)[::-1], "k": np.array([VOCABULARY])}
    for layer in range(LAYERS):
        for part, shape in (("keys", (2, 2, 6, 5)), ("values", (2, 2, 5, 6))):
            inputs[f"visual.{layer}.{part}"] = rng.standard_normal(shape, dtype=np.float32)
        for part in ("key", "value"):
            cache = rng.standard_normal((rows, 3, past, WIDTH // 3), dtype=np.float32)
            inputs[f"past_key_values.{layer}.{part}"] = cache
    outputs = []
    for name, fused in (("standard", False), ("fused", True)):
        graph = build_decoder(model, fused=fused)
        assert sum(node.op_type == "GroupQueryAttention" for node in graph.nodes) == LAYERS * fused
        (path,) = graph.save(tmp_path / f"{name}.onnx")
        session = open_session(path, 1)
        outputs.append(dict(zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True)))
    standard, fused_outputs = outputs
    assert standard.keys() == fused_outputs.keys()
    for name, expected in standard.items():
        found = fused_outputs[name]
        assert found.shape == expected.shape
        if name.startswith("present."):  # what stands at padded positions is never looked at
            found, expected = (np.where(real[:, None, :, None], cache, 0) for cache in (found, expected))
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)


def test_head_sizes_that_the_fused_attention_refuses_get_the_standard_operators():
    graph = build_decoder(random_model(), fused=True)  # heads of 12
    assert {node.domain for node in graph.nodes} == {""}


def test_initializers_keep_the_language_models_names():
    model = random_model(first=1)
    names = {n for n in build_decoder(model).weights if not n.startswith("constant.")}
    biases = {f"layers.{i}.output.bias" for i in model.adapter_layers}
    state = set(model.language_model.state_dict()) - {"lm_head.weight"}  # tied: one tensor, once
    assert names == state | biases


def test_an_untied_head_keeps_its_own_weights():
    model = random_model(tie_word_embeddings=False)
    weights = build_decoder(model).weights
    np.testing.assert_array_equal(weights["lm_head.weight"], model.language_model.lm_head.weight.detach())
    assert not np.array_equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


def test_the_same_model_gives_the_same_bytes(tmp_path, clip_checkpoint):
    contents = []
    for name in ("one", "two"):
        model = LoadedCheckpoint.load(clip_checkpoint).model
        (file,) = build_decoder(model).save(tmp_path / name / "decoder.onnx")
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("broken", ["transformer.wte.weight", "layers.0.output.weight"])
def test_a_weight_that_is_not_finite_is_named(broken):
    model = random_model()
    state = model.language_model_state() | model.adapter_state()
    state[broken].detach()[1, 1] = np.nan
    with pytest.raises(ItuneError) as error:
        build_decoder(model)
    assert broken in str(error.value)
