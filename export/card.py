"""The model card that a bundle carries as its README.md."""

from __future__ import annotations

import json
from pathlib import PurePosixPath

from ..runtime.bundle import GraphEntry, Manifest
from ..runtime.settings import Method

MODEL_CARD = "README.md"


def default_license(language_model: str, vision: str) -> str:
    """What holds when the exporter was told nothing else."""
    return (
        f"Derived from the language model {_name(language_model)} and the vision tower {_name(vision)}, whose "
        "licences apply, and from the data that the adapters were trained on."
    )


def model_card(manifest: Manifest) -> str:
    """A model card in Markdown, from what the manifest knows."""
    source, decoder, search = manifest.provenance, manifest.decoder, manifest.search
    training = source["training"]
    score = f"{100 * training['dev_cider']:.1f} (x 100)" if "dev_cider" in training else "not recorded"
    onnx = [f"{graph.role} {graph.precision}" for graph in manifest.graphs if graph.plan is None]
    plans = [graph for graph in manifest.graphs if graph.plan is not None]
    height, width = manifest.image.output_size
    shortlist, restore = manifest.tokens.shortlist, _RESTORE
    vocabulary = f"all {manifest.tokens.vocab_size:,} tokens of the language model"
    if shortlist is not None:
        vocabulary, restore = f"a shortlist of {shortlist:,} of {manifest.tokens.vocab_size:,} tokens", _NO_RESTORE
    return f"""# {manifest.name}

An image captioner: a frozen language model that sees the image through {_METHODS[manifest.method]},
exported to ONNX ({", ".join(onnx)}){" and TensorRT" if plans else ""} by itune {source["itune"]} on \
{source["exported"][:10]}.

    itune-run photo.jpg --bundle THIS_FOLDER

{_plans(manifest, plans) if plans else ""}| | |
|---|---|
| language model | {_name(source["language_model"]["source"])}: {decoder.layers} layers of {decoder.hidden_size} |
| vision tower | {_name(source["vision"]["source"])}: {decoder.visual_tokens} embeddings of {decoder.visual_width}, \
{height} x {width} pixels |
| adapters | {_adapters(manifest)} |
| vocabulary | {vocabulary} |
| search | {search.num_beams} beams, at most {search.max_new_tokens} tokens |
| CIDEr-D on the dev split | {score} |

## Licence of the weights

{manifest.license}

The licence of the itune code does not cover these weights.

## Limits

Captions are guesses: they can be wrong, and they repeat the biases of the data that the parts were trained on. Do
not rely on them where a mistake harms somebody.

## Training

```json
{json.dumps(training, indent=2)}
```

{restore}
"""


_RESTORE = "`itune-export --restore THIS_FOLDER -o FOLDER` gives the language model, the tower and the adapters back."
_NO_RESTORE = (
    "Other tokens are not in the decoder: captions are written with the shortlist alone, scores are relative to it, "
    "and the language model cannot be restored from this bundle."
)


_METHODS: dict[Method, str] = {
    "i-tuning": "I-Tuning adapters (arXiv 2202.06574)",
    "smallcap": "SmallCap cross-attention (arXiv 2209.15323)",
    "clipcap": "a ClipCap prefix (arXiv 2111.09734)",
}


def _adapters(manifest: Manifest) -> str:
    decoder = manifest.decoder
    if manifest.method == "clipcap":
        return f"a mapper from the image to {manifest.tokens.prefix} embeddings before the caption"
    layers, width = decoder.adapter_layers, decoder.bottleneck
    place = f"on {len(layers)} layers from layer {layers[0]}"
    if manifest.method == "smallcap" and width is not None and decoder.adapter_heads is not None:
        return f"{place}, {decoder.adapter_heads} heads of width {width // decoder.adapter_heads}"
    return f"{place}, bottleneck {width}, heads {decoder.adapter_heads}"


def _plans(manifest: Manifest, graphs: list[GraphEntry]) -> str:
    """The section on TensorRT plans: what they run on, and for how much they have room."""
    rows = []
    for graph in graphs:
        assert graph.plan is not None
        plan, size = graph.plan, manifest.files[graph.file].bytes / 1e6
        rows.append(
            f"| {graph.file} | {graph.precision} | {size:.1f} MB | {', '.join(plan.compute_capabilities)} | "
            f"{plan.flavour} {plan.version} | {plan.source} |\n"
        )
    largest = {name: sizes.max for graph in graphs if graph.plan for name, sizes in graph.plan.profiles[0].items()}
    images, rows_, prompt = largest["pixels"][0], largest["tokens"][0], len(manifest.tokens.prompt_tokens)
    tokens = largest["mask"][1] - 2 * prompt
    return f"""That takes the TensorRT plans, on a GPU of one of the compute capabilities below, with the very TensorRT
that built them. Anywhere else, `--engine onnxruntime` runs the ONNX graphs that they come from.

| plan | precision | size | compute capabilities | built with | from |
|---|---|---|---|---|---|
{"".join(rows)}
They have room for {images} images at once, {rows_} captions in the making (images x beams) and {tokens} new tokens.

"""


def _name(source: str) -> str:
    """A hub id as it is, a folder beside the checkpoint by its name."""
    return PurePosixPath(source).name if source.startswith(("/", ".")) else source
