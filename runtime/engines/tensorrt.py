"""TensorRT plans behind the engine protocol, without torch.

All that a search reads stays on the GPU. The vision plan writes an image's visual keys/values there, and every step
reads them. The key/value cache alternates between two buffers: a step reads one and writes the other, and the plan
itself reorders rows by their parents. A step sends the new tokens up in one copy and fetches its k candidates a row in
another. Buffers are allocated once, as large as the plans' profiles allow, and reused.
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

from ..bundle import Bundle
from ..errors import BundleError, SearchError
from ..graph_names import PAST, PRESENT
from .base import Bool, Candidates, Float32, Int64, UInt8, last_positions
from .cuda import CudaDevice, Memory
from .tensorrt_plan import Plan, check_capability, choose_profile, import_tensorrt, largest, plan_graph

ALIGNMENT = 256
"""The alignment of addresses that kernels may assume, in bytes."""
_K = "k"
_READ = ("tokens", "positions", "mask", "parents")
"""The decoder's inputs that come from the host at every step."""


class Layout(NamedTuple):
    """Several tensors in one piece of memory."""

    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, sizes: Iterable[tuple[str, int]]) -> Layout:
        """Place tensors one after the other, each aligned; `sizes` in bytes."""
        offsets, end = {}, 0
        for name, size in sizes:
            offsets[name] = end
            end += -(-size // ALIGNMENT) * ALIGNMENT
        return cls(offsets, end)


class _Buffers(NamedTuple):
    """Device memory for one part of a state: visual keys/values, and the two sides of the cache."""

    visual: Memory
    caches: tuple[Memory, Memory]


@dataclass(eq=False)
class _Part:
    """Images that go through the plans together, as many as the profiles allow."""

    buffers: _Buffers
    images: int
    first_row: int  # its first row among all rows of the previous step
    rows: int  # the number of its rows in that step
    length: int = 0  # tokens in the cache
    side: int = 0  # which of the two caches holds them


@dataclass
class TensorRTState:
    """The images of one `encode`, split into parts, and the rows' mask of real tokens."""

    engine: TensorRTEngine
    parts: list[_Part] = field(default_factory=list)
    mask: Bool | None = None  # [rows, cached tokens]
    embedding: Float32 | None = None

    @property
    def images(self) -> int:
        """How many images are still in the state."""
        return sum(part.images for part in self.parts)

    def keep(self, images: Int64) -> None:
        """Drop every image but `images`; the others' visual state moves together on the device."""
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

    def __init__(self, device: CudaDevice, vision: Plan, decoder: Plan, most_candidates: int) -> None:
        """`most_candidates` is the vocabulary's; a plan returns fewer, and a search that needs more is refused.

        Raises:
            BundleError: the two plans do not fit each other.
        """
        self.device, self.vision, self.decoder = device, vision, decoder
        self.most_candidates = most_candidates
        self._visual = list(vision.outputs)
        self._caches = [name for name in decoder.inputs if name.startswith(PAST)]
        (self._pixels,) = vision.inputs
        fixed = {*_READ, _K, *self._caches}
        inputs = {name: dtype for name, dtype in decoder.inputs.items() if name not in fixed}
        presents = {name.replace(PAST, PRESENT): decoder.inputs[name] for name in self._caches}
        outputs = presents | {name: decoder.outputs.get(name) for name in Candidates._fields}
        fits = (inputs, outputs) == (vision.outputs, decoder.outputs) and fixed <= decoder.inputs.keys()
        if not fits or _K not in decoder.host_inputs:
            raise BundleError(f"{decoder.label} does not fit {vision.label} in names or types; export the bundle again")

        self._limits = limits = {name: largest(decoder.profiles, name) for name in decoder.inputs}
        pixels = largest(vision.profiles, self._pixels)
        self.most_images = min(pixels[0], *(limits[name][0] for name in self._visual))
        """How many images go through the plans together."""
        self.most_rows = limits["tokens"][0]
        self.most_k = limits[_K][0]
        # The last token of a caption is not fed back: a step reads at most this many, one of them new.
        self.most_positions = min(limits["mask"][1], min((limits[name][2] for name in self._caches), default=0) + 1)
        """Tokens that a prompt and its caption can have, without the last."""

        self._visual_layout = Layout.of((name, self.most_images * self._visual_bytes(name)) for name in self._visual)
        self._cache_layout = Layout.of(
            (name, decoder.inputs[name].itemsize * self.most_rows * heads * limits["mask"][1] * width)
            for name, (_, heads, _, width) in ((name, limits[name]) for name in self._caches)
        )
        sizes = [prod(limits[name]) * decoder.inputs[name].itemsize for name in _READ]
        photos = Layout.of([(self._pixels, self.most_images * prod(pixels[1:]))]).size
        upload = max(Layout.of(zip(_READ, sizes, strict=True)).size, photos)
        download = self._result_layout(self.most_rows, self.most_k).size
        self._sent, self._received = device.allocate_host(upload), device.allocate_host(download)
        self._inputs, self._results = device.allocate(upload), device.allocate(download)
        self._k = device.allocate_host(decoder.inputs[_K].itemsize)
        self._free: list[_Buffers] = []
        self._lock = threading.Lock()

    @classmethod
    def load(cls, bundle: Bundle, *, cuda_graphs: bool = False) -> TensorRTEngine:
        """Load a bundle's plans onto the GPU.

        `cuda_graphs`: let TensorRT-RTX replay steps as CUDA graphs (TensorRT cannot; see `Plan`).

        Raises:
            BundleError: the bundle has no plans, or not the plans that its manifest describes.
            EngineError: no GPU, or not one they were built for; the library is missing, or in another version.
        """
        graphs = [plan_graph(bundle, role) for role in ("vision", "decoder")]
        device, plans = CudaDevice(), []
        for graph, settings in graphs:
            path = bundle.path(graph.file)
            check_capability(settings, device.capability, str(path))
            trt = import_tensorrt(settings, str(path))
            plans.append(Plan(trt, path, graph, settings.profiles, cuda_graphs))
        vision, decoder = plans
        return cls(device, vision, decoder, bundle.manifest.tokens.candidates)

    def encode(self, pixels: UInt8) -> TensorRTState:
        """Encode images, uint8 [B, H, W, 3]; more than `most_images` take several runs."""
        # Larger photos would not fit into the buffers.
        choose_profile(self.vision.profiles, {self._pixels: (1, *pixels.shape[1:])}, self.vision.label)
        state = TensorRTState(self)
        with self._lock:
            for first in range(0, len(pixels), self.most_images):
                some = pixels[first : first + self.most_images]
                part = _Part(self._take_buffers(), len(some), first_row=first, rows=len(some))
                weakref.finalize(part, self._free.append, part.buffers).atexit = False
                self._send([(self._pixels, some)])
                addresses = {self._pixels: self._inputs.address} | self._visual_addresses(part)
                self.vision.run({self._pixels: some.shape}, addresses, self.device.stream)
                self.device.synchronize()  # before the next photos replace these
                state.parts.append(part)
        return state

    def step(
        self, tokens: Int64, parents: Int64, state: TensorRTState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """Feed `tokens` [rows, T] to the decoder, in a run for each part of the state."""
        real = np.ones(tokens.shape, np.bool_) if mask is None else mask
        if state.mask is not None:
            real = np.concatenate([state.mask[parents], real], axis=1)
        k = min(k, self.most_candidates)
        per_image = len(tokens) // state.images
        self._check_limits(max(part.images for part in state.parts) * per_image, real.shape[1], k)
        positions = last_positions(real, tokens.shape[1])
        read: dict[str, NDArray[Any]] = {"tokens": tokens, "positions": positions, "mask": real}
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
            addresses[name.replace(PAST, PRESENT)] = present.address + offset
        decoder.run(sizes, addresses, self.device.stream)

        received = self._received.array[: layout.size]
        self.device.download(self._results.address, received)
        self.device.synchronize()
        part.side, part.length = 1 - part.side, part.length + read["tokens"].shape[1]
        # Copied, because the next step overwrites what was received.
        shapes = {"logits": (rows, k_run), "token_ids": (rows, k_run), "logsumexp": (rows,)}
        found = [_view(received, layout.offsets[name], decoder.outputs[name], shapes[name]) for name in shapes]
        return Candidates(found[0][:, :k].copy(), found[1][:, :k].astype(np.int64), found[2].copy())

    def gather_visual(self, part: _Part, images: Int64) -> None:
        """Move the visual keys/values of `images`, ascending, to the front of their part; the others are lost."""
        with self._lock:
            for name, address in self._visual_addresses(part).items():
                size = self._visual_bytes(name)
                # In ascending order, no image overwrites one that is still to be moved.
                for place, image in enumerate(images.tolist()):
                    if place != image:
                        self.device.copy(address + image * size, address + place * size, size)
        part.images = len(images)

    def _send(self, arrays: list[tuple[str, NDArray[Any]]]) -> Layout:
        """Copy arrays into page-locked memory and from there, in one piece, to the device."""
        layout = Layout.of((name, array.nbytes) for name, array in arrays)
        for name, array in arrays:
            _view(self._sent.array, layout.offsets[name], array.dtype, array.shape)[...] = array
        self.device.upload(self._sent.array[: layout.size], self._inputs.address)
        return layout

    def _take_buffers(self) -> _Buffers:
        """The buffers of a state that is gone, or new ones."""
        if self._free:
            return self._free.pop()
        visual, cache = self._visual_layout.size, self._cache_layout.size
        return _Buffers(self.device.allocate(visual), (self.device.allocate(cache), self.device.allocate(cache)))

    def _visual_addresses(self, part: _Part) -> dict[str, int]:
        start = part.buffers.visual.address
        return {name: start + offset for name, offset in self._visual_layout.offsets.items()}

    def _visual_bytes(self, name: str) -> int:
        """The size of one image's visual keys or values."""
        return prod(self._limits[name][1:]) * self.decoder.inputs[name].itemsize

    def _result_layout(self, rows: int, k: int) -> Layout:
        counts = {"logits": rows * k, "token_ids": rows * k, "logsumexp": rows}
        return Layout.of((name, count * self.decoder.outputs[name].itemsize) for name, count in counts.items())

    def _check_limits(self, rows: int, positions: int, k: int) -> None:
        for wanted, most, what, mend in (
            (rows, self.most_rows, "rows (images x beams)", "use fewer, or export with larger --max-beams"),
            (positions, self.most_positions, "tokens of prompt and caption", "export with larger --max-new-tokens"),
            (k, self.most_k, "candidates a row", "use fewer beams, a lower top_k or --engine onnxruntime"),
        ):
            if wanted > most:
                raise SearchError(f"{self.decoder.label}: at most {most} {what}, not {wanted}: {mend}")


def _view(memory: UInt8, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A view of bytes as an array."""
    return memory[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
