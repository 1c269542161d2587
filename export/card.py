"""The model card of a bundle, its README.md."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from ..runtime.bundle import Manifest
from ..runtime.settings import Method

MODEL_CARD = "README.md"
_METHODS: dict[Method, str] = {
    "i-tuning": "I-Tuning adapters (arXiv 2202.06574)",
    "smallcap": "SmallCap cross-attention (arXiv 2209.15323)",
    "clipcap": "a ClipCap prefix (arXiv 2111.09734)",
}


def default_license(language_model: str, vision: str) -> str:
    """The licence of the weights unless `--license` gives one."""
    return (
        f"Derived from the language model {_name(language_model)} and the vision tower {_name(vision)}, whose "
        "licences apply, and from the data that the adapters were trained on."
    )


def model_card(manifest: Manifest) -> str:
    """The model card in Markdown."""
    source, decoder, tokens, search = manifest.provenance, manifest.decoder, manifest.tokens, manifest.search
    training, plans = source["training"], _plans(manifest)
    onnx = ", ".join(f"{graph.role} {graph.precision}" for graph in manifest.graphs if graph.plan is None)
    height, width = manifest.image.output_size
    vocabulary = f"all {tokens.vocab_size:,} tokens of the language model"
    restore = "`itune-export --restore THIS_FOLDER -o FOLDER` restores the language model, the tower and the adapters."
    if tokens.shortlist is not None:
        vocabulary = f"a shortlist of {tokens.shortlist:,} of {tokens.vocab_size:,} tokens"
        restore = (
            "The decoder has no other tokens: captions consist of the shortlist, scores are relative to it, and the "
            "language model cannot be restored from this bundle."
        )
    return f"""# {manifest.name}

An image captioner: a frozen language model that sees the image through {_METHODS[manifest.method]},
exported to ONNX ({onnx}){" and TensorRT" if plans else ""} by itune {source["itune"]} on {source["exported"][:10]}.

    itune-run photo.jpg --bundle THIS_FOLDER

{plans}| | |
|---|---|
| language model | {_name(source["language_model"]["source"])}: {decoder.layers} layers of {decoder.hidden_size} |
| vision tower | {_name(source["vision"]["source"])}: {decoder.visual_tokens} embeddings of {decoder.visual_width}, \
{height} x {width} pixels |
| adapters | {_adapters(manifest)} |
| vocabulary | {vocabulary} |
| search | {search.num_beams} beams, at most {search.max_new_tokens} tokens |
| CIDEr-D on the dev split | \
{f"{100 * training['dev_cider']:.1f} (x 100)" if "dev_cider" in training else "not recorded"} |

## Licence of the weights

{manifest.license}

The licence of the itune code does not cover these weights.

## Limits

Captions are guesses: they can be wrong, and they repeat the biases of the data that the parts were trained on. Do
not rely on them where a mistake could harm somebody.

## Training

```json
{json.dumps(training, indent=2)}
```

{restore}
"""


def _adapters(manifest: Manifest) -> str:
    decoder = manifest.decoder
    if manifest.method == "clipcap":
        return f"a mapper from the image to {manifest.tokens.prefix} embeddings before the caption"
    layers, width, heads = decoder.adapter_layers, decoder.bottleneck, decoder.adapter_heads
    place = f"on {len(layers)} layers from layer {layers[0]}"
    if manifest.method == "smallcap" and width and heads:
        return f"{place}, {heads} heads of width {width // heads}"
    return f"{place}, bottleneck {width}, heads {heads}"


def _plans(manifest: Manifest) -> str:
    """The section on TensorRT plans: the GPUs they run on and the sizes they have room for."""
    plans = [(graph, graph.plan) for graph in manifest.graphs if graph.plan is not None]
    if not plans:
        return ""
    rows = "".join(
        f"| {graph.file} | {graph.precision} | {manifest.files[graph.file].bytes / 1e6:.1f} MB | "
        f"{', '.join(plan.compute_capabilities)} | {plan.flavour} {plan.version} | {plan.source} |\n"
        for graph, plan in plans
    )
    largest = {name: sizes.max for _, plan in plans for name, sizes in plan.profiles[0].items()}
    tokens = largest["mask"][1] - 2 * len(manifest.tokens.prompt_tokens)
    return f"""That uses the TensorRT plans, on a GPU of one of the compute capabilities below, with the very TensorRT
version that built them. Anywhere else, `--engine onnxruntime` runs the ONNX graphs that the plans were built from.

| plan | precision | size | compute capabilities | built with | from |
|---|---|---|---|---|---|
{rows}
The plans have room for {largest["pixels"][0]} images at once, {largest["tokens"][0]} beams in all (images x beams) \
and {tokens} new tokens.

"""


def _name(source: str) -> str:
    """A hub id as it is; of a folder, its name alone."""
    return PurePosixPath(source).name if source.startswith(("/", ".")) else source
