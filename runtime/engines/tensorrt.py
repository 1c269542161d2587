"""TensorRT plans behind the engine protocol, without torch.

What a search needs stays on the GPU: an image's visual keys/values are written there by the vision plan and read by
every step, and the key/value cache goes back and forth between two buffers, one that a step reads and one that it
writes, with the parents' reordering inside the plan. A step sends the new tokens up in one copy and fetches its k
candidates a row in another. Buffers are made once, as large as the plans' profiles allow, and reused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import MANIFEST, Bundle
from ..errors import BundleError, SearchError
from .base import Bool, Candidates, Int64, UInt8
from .cuda import CudaDevice, Device, HostMemory, Memory
from .tensorrt_plan import Plan, check_capability, import_tensorrt, largest, plan_graph

ALIGNMENT = 256
"""What kernels may take for granted about an address, in bytes."""
_PAST, _PRESENT, _K = "past_key_values.", "present.", "k"
_READ = ("tokens", "positions", "mask", "parents")
"""The decoder's inputs that come from the host at every step."""


class Layout(NamedTuple):
    """Several tensors in one piece of memory."""

    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, sizes: Iterable[tuple[str, int]]) -> Layout:
        """One after the other in the order given, each aligned; `sizes` in bytes."""
        offsets, end = {}, 0
        for name, size in sizes:
            offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(offsets, end)


@dataclass
class _Buffers:
    """Device memory for one part of a state: visual keys/values, and the two sides of the cache."""

    visual: Memory
    caches: tuple[Memory, Memory]


@dataclass(eq=False)
class _Part:
    """Images that go through the plans together, as many as the profiles allow."""

    buffers: _Buffers
    images: int
    first_row: int
    """Its first row among all rows of the previous step."""
    rows: int
    """How many rows it had in that step."""
    length: int = 0
    """Tokens in the cache."""
    side: int = 0
    """Which of the two caches holds them."""


@dataclass
class TensorRTState:
    """The images of one `encode`, split into parts, and the rows' mask of real tokens."""

    engine: TensorRTEngine
    parts: list[_Part] = field(default_factory=list)
    mask: Bool | None = None  # [rows, cached tokens]

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return sum(part.images for part in self.parts)

    def keep(self, images: Int64) -> None:
        """Drop every image but these (see `State.keep`); the others' visual state moves together on the device."""
        first, kept = 0, []
        for part in self.parts:
            inside = images[(images >= first) & (images < first + part.images)] - first
            first += part.images
            if len(inside):
                self.engine.gather_visual(part, inside)
                kept.append(part)
        self.parts = kept


class TensorRTEngine:
    """A bundle's plans behind the engine protocol. Threads may share it: they take turns on its stream."""

    def __init__(self, device: Device, vision: Plan, decoder: Plan, most_candidates: int) -> None:
        """`most_candidates`: see `Engine`; a plan gives fewer, and a search that asks for more is refused.

        Raises:
            BundleError: the two plans do not fit together.
        """
        self.device, self.vision, self.decoder = device, vision, decoder
        self.most_candidates = most_candidates
        self._visual = list(vision.outputs)
        self._caches = [name for name in decoder.inputs if name.startswith(_PAST)]
        (self._pixels,) = vision.inputs
        self._check()

        limits = {name: largest(decoder.profiles, name) for name in decoder.inputs}
        pixels = largest(vision.profiles, self._pixels)
        self._limits = limits
        self._photo = tuple(pixels[1:])
        self.most_images = min(pixels[0], *(limits[name][0] for name in self._visual))
        """How many images go through the plans together."""
        self.most_rows = limits["tokens"][0]
        self.most_k = limits[_K][0]
        # The last token of a caption is not fed back: a step reads at most so many, one of them new.
        self.most_positions = min(limits["mask"][1], min((limits[name][2] for name in self._caches), default=0) + 1)
        """Tokens that a caption and what stands before it can have, without the last."""

        self._visual_layout = Layout.of((name, self.most_images * self._visual_bytes(name)) for name in self._visual)
        self._cache_layout = Layout.of(
            (name, decoder.inputs[name].itemsize * self.most_rows * heads * limits["mask"][1] * width)
            for name, (_, heads, _, width) in ((name, limits[name]) for name in self._caches)
        )
        sizes = [prod(limits[name]) * decoder.inputs[name].itemsize for name in _READ]
        upload = Layout.of(zip(_READ, sizes, strict=True)).size
        download = self._result_layout(self.most_rows, self.most_k).size
        photos = self.most_images * prod(self._photo)
        self._sent, self._received = device.allocate_host(max(upload, photos)), device.allocate_host(download)
        self._inputs, self._results = device.allocate(max(upload, photos)), device.allocate(download)
        self._k: HostMemory = device.allocate_host(decoder.inputs[_K].itemsize)
        self._free: list[_Buffers] = []
        self._lock = threading.Lock()

    @classmethod
    def load(cls, bundle: Bundle, *, cuda_graphs: bool = False) -> TensorRTEngine:
        """Load a bundle's plans onto the GPU.

        `cuda_graphs`: have TensorRT-RTX replay steps as CUDA graphs (see `Plan.use_cuda_graphs`).

        Raises:
            BundleError: the bundle has no plans, or they are not what its manifest says.
            EngineError: no GPU, or another one than they were built for; the library is missing, or another version.
        """
        graphs = [(str(bundle.path(graph.file)), graph, plan) for graph, plan in _plans(bundle)]
        device = CudaDevice()
        loaded = []
        for label, graph, plan in graphs:
            check_capability(plan, device.capability, label)
            trt = import_tensorrt(plan, label)
            loaded.append(Plan(trt, bundle.path(graph.file).read_bytes(), graph, plan.profiles, label))
            loaded[-1].use_cuda_graphs(cuda_graphs)
        vision, decoder = loaded
        return cls(device, vision, decoder, bundle.manifest.tokens.candidates)

    def encode(self, pixels: UInt8) -> TensorRTState:
        """Images, uint8 [B, H, W, 3], to their keys/values; more than `most_images` go in several runs."""
        if pixels.shape[1:] != self._photo:
            raise SearchError(f"{self.vision.label} takes photos of {self._photo}, not {pixels.shape[1:]}")
        state = TensorRTState(self)
        with self._lock:
            for first in range(0, len(pixels), self.most_images):
                some = pixels[first : first + self.most_images]
                part = _Part(self._take_buffers(), len(some), first_row=first, rows=len(some))
                weakref.finalize(part, self._free.append, part.buffers).atexit = False
                self._send([(self._pixels, some)])
                addresses = {self._pixels: self._inputs.address} | self._visual_addresses(part)
                self.vision.run({self._pixels: some.shape}, addresses, self.device.stream)
                self.device.synchronize()  # before the next photos take the place of these
                state.parts.append(part)
        return state

    def step(
        self, tokens: Int64, parents: Int64, state: TensorRTState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """One step of the decoder (see `Engine.step`), a run for each part of the state."""
        real = np.ones(tokens.shape, np.bool_) if mask is None else mask
        if state.mask is not None:
            real = np.concatenate([state.mask[parents], real], axis=1)
        k = min(k, self.most_candidates)
        per_image = len(tokens) // state.images
        self._check_limits(max(part.images for part in state.parts), per_image, real.shape[1], k)
        read: dict[str, NDArray[Any]] = {
            "tokens": tokens,
            "positions": np.maximum(real.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :],
            "mask": real,
        }
        results, first = [], 0
        with self._lock:
            for part in state.parts:
                rows = slice(first, first + part.images * per_image)
                own = {name: array[rows] for name, array in read.items()}
                results.append(self._step(part, own | {"parents": parents[rows] - part.first_row}, k))
                part.first_row, part.rows = first, rows.stop - first
                first = rows.stop
        state.mask = real
        return Candidates(*(np.concatenate(arrays) for arrays in zip(*results, strict=True)))

    def _step(self, part: _Part, read: Mapping[str, NDArray[Any]], k: int) -> Candidates:
        decoder, rows = self.decoder, len(read["tokens"])
        k_run = max(k, min(profile[_K].min[0] for profile in decoder.profiles))
        sizes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in read.items()} | {_K: (k_run,)}
        sizes |= {name: (part.images, *self._limits[name][1:]) for name in self._visual}
        for name in self._caches:
            _, heads, _, width = self._limits[name]
            sizes[name] = (part.rows, heads, part.length, width)

        sent = self._send([(name, read[name].astype(decoder.inputs[name], copy=False)) for name in _READ])
        self._k.array[:] = np.frombuffer(np.array([k_run], decoder.inputs[_K]).tobytes(), np.uint8)
        layout = self._result_layout(rows, k_run)
        past, present = part.buffers.caches[part.side], part.buffers.caches[1 - part.side]
        addresses = {name: self._inputs.address + offset for name, offset in sent.offsets.items()}
        addresses |= {name: self._results.address + offset for name, offset in layout.offsets.items()}
        addresses |= self._visual_addresses(part) | {_K: self._k.array.ctypes.data}
        for name, offset in self._cache_layout.offsets.items():
            addresses[name] = past.address + offset
            addresses[name.replace(_PAST, _PRESENT)] = present.address + offset
        decoder.run(sizes, addresses, self.device.stream)

        received = self._received.array[: layout.size]
        self.device.download(self._results.address, received)
        self.device.synchronize()
        part.side, part.length = 1 - part.side, part.length + read["tokens"].shape[1]
        # Copied: the next step writes over what was received.
        shapes = {"logits": (rows, k_run), "token_ids": (rows, k_run), "logsumexp": (rows,)}
        found = [_take(received, layout.offsets[name], decoder.outputs[name], shapes[name]) for name in shapes]
        return Candidates(found[0][:, :k].copy(), found[1][:, :k].astype(np.int64), found[2].copy())

    def gather_visual(self, part: _Part, images: Int64) -> None:
        """Move the visual keys/values of `images`, ascending, to the front of their part; the others are lost."""
        with self._lock:
            for name, address in self._visual_addresses(part).items():
                size = self._visual_bytes(name)
                # Ascending, an image never comes to lie where one that is still to be moved is.
                for place, image in enumerate(images.tolist()):
                    if place != image:
                        self.device.copy(address + image * size, address + place * size, size)
        part.images = len(images)

    def _send(self, arrays: Iterable[tuple[str, NDArray[Any]]]) -> Layout:
        """Copy arrays into page-locked memory and from there, in one piece, to the device."""
        arrays = list(arrays)
        layout = Layout.of((name, array.nbytes) for name, array in arrays)
        for name, array in arrays:
            _take(self._sent.array, layout.offsets[name], array.dtype, array.shape)[...] = array
        end = max(layout.offsets[name] + array.nbytes for name, array in arrays)
        self.device.upload(self._sent.array[:end], self._inputs.address)
        return layout

    def _take_buffers(self) -> _Buffers:
        """Those of a state that is no more, or new ones."""
        if self._free:
            return self._free.pop()
        visual, *caches = (
            self.device.allocate(size)
            for size in (self._visual_layout.size, self._cache_layout.size, self._cache_layout.size)
        )
        return _Buffers(visual, (caches[0], caches[1]))

    def _visual_addresses(self, part: _Part) -> dict[str, int]:
        start = part.buffers.visual.address
        return {name: start + offset for name, offset in self._visual_layout.offsets.items()}

    def _visual_bytes(self, name: str) -> int:
        """The size of one image's visual keys or values."""
        return prod(self._limits[name][1:]) * self.decoder.inputs[name].itemsize

    def _result_layout(self, rows: int, k: int) -> Layout:
        outputs = self.decoder.outputs
        counts = {"logits": rows * k, "token_ids": rows * k, "logsumexp": rows}
        return Layout.of((name, count * outputs[name].itemsize) for name, count in counts.items())

    def _check_limits(self, images: int, per_image: int, positions: int, k: int) -> None:
        label = self.decoder.label
        if images * per_image > self.most_rows:
            raise SearchError(
                f"{label} takes {self.most_rows} rows, and {images} images with {per_image} beams each are more: give "
                f"fewer beams or images at once, or export it again with larger --max-beams or --max-batch"
            )
        if positions > self.most_positions:
            raise SearchError(
                f"{label} takes {self.most_positions} tokens, prompt included, and the caption has {positions}: export "
                f"it again with larger --max-new-tokens"
            )
        if k > self.most_k:
            raise SearchError(
                f"{label} gives the {self.most_k} best tokens of a row, and the search options need {k}: give fewer "
                f"beams or a lower top_k, or run it with --engine onnxruntime"
            )

    def _check(self) -> None:
        vision, decoder = self.vision, self.decoder
        expected = {*_READ, _K, *self._visual, *self._caches}
        presents = {name.replace(_PAST, _PRESENT): decoder.inputs[name] for name in self._caches}
        outputs = presents | {name: decoder.outputs.get(name) for name in Candidates._fields}
        if expected != decoder.inputs.keys() or outputs != decoder.outputs or _K not in decoder.host_inputs:
            raise BundleError(
                f"{decoder.label}: its inputs and outputs are not those of a decoder of itune's with the visual state "
                f"of {vision.label}; export the bundle again"
            )
        if any(vision.outputs[name] != decoder.inputs[name] for name in self._visual):
            raise BundleError(
                f"{decoder.label} and {vision.label} differ in the type of the visual state; export again"
            )
        for plan in (vision, decoder):
            if any(profile.keys() != plan.inputs.keys() for profile in plan.profiles):
                raise BundleError(f"{plan.label}: {MANIFEST} lacks the profile of an input; export the bundle again")


def _plans(bundle: Bundle) -> list[Any]:
    return [plan_graph(bundle, role) for role in ("vision", "decoder")]


def _take(memory: UInt8, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A view of bytes as an array."""
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
