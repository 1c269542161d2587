from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from itune.adapter import AdapterConfig
from itune.export.decoder import build_decoder
from itune.export.graph import Graph
from itune.model import ITuningModel, LoadedCheckpoint
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


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ItuneError, match="relu6"):
        build_decoder(random_model(activation_function="relu6"))
