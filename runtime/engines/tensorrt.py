"""TensorRT plans behind the engine protocol, without torch.

All that a search reads stays on the GPU. The vision plan writes an image's visual keys/values there, and every step
reads them. The key/value cache alternates between two buffers: a step reads one and writes the other, and the plan
itself reorders rows by their parents. A step sends the new tokens up in one copy and fetches its k candidates a row in
another. Buffers are allocated once, as large as the plans' profiles allow, and reused.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import BundleError, SearchError
from ..graph_names import MASK, PARENTS, PAST, POSITIONS, PRESENT, STEP, TOKENS, K
from .base import Bool, Candidates, Float32, Int64, UInt8, mask_and_positions
from .cuda import CudaDevice, Memory
from .tensorrt_plan import Plan, choose_profile, largest, plan_graph

ALIGNMENT = 256
"""The alignment of addresses that kernels may assume, in bytes."""
_SENT = (TOKENS, POSITIONS, MASK, PARENTS)
"""The decoder's inputs that every step copies to the device; `k` stays on the host."""


class Layout:
    """Tensors in one piece of memory, one after the other, each aligned."""

    def __init__(self, dtypes: Mapping[str, np.dtype[Any]], shapes: Mapping[str, Sequence[int]]) -> None:
        self.dtypes, self.shapes = dtypes, shapes
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, shape in shapes.items():
            self.offsets[name] = self.size
            self.size += -(-prod(shape) * dtypes[name].itemsize // ALIGNMENT) * ALIGNMENT

    def addresses(self, start: int) -> dict[str, int]:
        """The address of each tensor in memory that begins at `start`."""
        return {name: start + offset for name, offset in self.offsets.items()}

    def view(self, memory: UInt8, name: str) -> NDArray[Any]:
        """A tensor in `memory`."""
        dtype, shape, start = self.dtypes[name], self.shapes[name], self.offsets[name]
        return memory[start : start + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


@dataclass(eq=False)
class _Part:
    """Images that go through the plans together, as many as the profiles allow."""

    visual: Memory
    caches: tuple[Memory, Memory]
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
        """`most_candidates`: as in `Engine`; a plan returns at most `most_k`, and a search that needs more is refused.

        Raises:
            BundleError: the two plans do not fit each other.
        """
        self.device, self.vision, self.decoder = device, vision, decoder
        self.most_candidates = most_candidates
        self._visual = list(vision.outputs)
        self._caches = [name for name in decoder.inputs if name.startswith(PAST)]
        (self._pixels,) = vision.inputs
        fixed = {*STEP, *self._caches}
        inputs = {name: dtype for name, dtype in decoder.inputs.items() if name not in fixed}
        presents = {name.replace(PAST, PRESENT): decoder.inputs[name] for name in self._caches}
        outputs = presents | {name: decoder.outputs.get(name) for name in Candidates._fields}
        fits = (inputs, outputs) == (vision.outputs, decoder.outputs) and fixed <= decoder.inputs.keys()
        if not fits or K not in decoder.host_inputs:
            raise BundleError(f"{decoder.label} does not fit {vision.label} in names or types; export the bundle again")

        self._limits = limits = {name: largest(decoder.profiles, name) for name in decoder.inputs}
        pixels = largest(vision.profiles, self._pixels)
        self.most_images = min(pixels[0], *(limits[name][0] for name in self._visual))
        """How many images go through the plans together."""
        self.most_rows, self.most_k = limits[TOKENS][0], limits[K][0]
        # The last token of a caption is not fed back: a step reads at most this many, one of them new.
        self.most_positions = min(limits[MASK][1], min((limits[name][2] for name in self._caches), default=0) + 1)
        """Tokens that a prompt and its caption can have, without the last."""

        photos = {self._pixels: (self.most_images, *pixels[1:])}
        visual = {name: (self.most_images, *limits[name][1:]) for name in self._visual}
        caches = {
            name: (self.most_rows, heads, limits[MASK][1], width)
            for name, (_, heads, _, width) in ((name, limits[name]) for name in self._caches)
        }
        self._visual_layout, self._cache_layout = Layout(decoder.inputs, visual), Layout(decoder.inputs, caches)
        step = Layout(decoder.inputs, {name: limits[name] for name in _SENT})
        upload = max(step.size, Layout(vision.inputs, photos).size)
        download = self._result_layout(self.most_rows, self.most_k).size
        self._sent, self._received = device.allocate_host(upload), device.allocate_host(download)
        self._inputs, self._results = device.allocate(upload), device.allocate(download)
        self._k = device.allocate_host(decoder.inputs[K].itemsize)
        self._free: list[tuple[Memory, tuple[Memory, Memory]]] = []  # of states that are gone
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
        device = CudaDevice()
        vision, decoder = (
            Plan(bundle.path(graph.file), graph, built, device.capability, cuda_graphs) for graph, built in graphs
        )
        return cls(device, vision, decoder, bundle.manifest.tokens.candidates)

    def encode(self, pixels: UInt8) -> TensorRTState:
        """Encode images, uint8 [B, H, W, 3]; more than `most_images` take several runs."""
        # Larger photos would not fit into the buffers.
        choose_profile(self.vision.profiles, {self._pixels: (1, *pixels.shape[1:])}, self.vision.label)
        state = TensorRTState(self)
        with self._lock:
            for first in range(0, len(pixels), self.most_images):
                some = pixels[first : first + self.most_images]
                visual, caches = self._free.pop() if self._free else self._allocate()
                part = _Part(visual, caches, len(some), first_row=first, rows=len(some))
                weakref.finalize(part, self._free.append, (visual, caches)).atexit = False
                addresses = self._send(self.vision, {self._pixels: some}) | self._visual_layout.addresses(
                    visual.address
                )
                self.vision.run({self._pixels: some.shape}, addresses, self.device.stream)
                self.device.synchronize()  # before the next photos replace these
                state.parts.append(part)
        return state

    def step(
        self, tokens: Int64, parents: Int64, state: TensorRTState, k: int, *, mask: Bool | None = None
    ) -> Candidates:
        """Feed `tokens` [rows, T] to the decoder, in a run for each part of the state."""
        real, positions = mask_and_positions(state.mask, tokens, parents, mask)
        k = min(k, self.most_candidates)
        per_image = len(tokens) // state.images
        self._check_limits(max(part.images for part in state.parts) * per_image, real.shape[1], k)
        results, first = [], 0
        with self._lock:
            for part in state.parts:
                rows = slice(first, first + part.images * per_image)
                arrays = tokens[rows], positions[rows], real[rows], parents[rows] - part.first_row
                results.append(self._step(part, dict(zip(_SENT, arrays, strict=True)), k))
                part.first_row, part.rows = first, rows.stop - first
                first = rows.stop
        state.mask = real
        return Candidates(*(np.concatenate(each) for each in zip(*results, strict=True)))

    def _step(self, part: _Part, arrays: Mapping[str, NDArray[Any]], k: int) -> Candidates:
        decoder, rows = self.decoder, len(arrays[TOKENS])
        sizes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()} | {K: (k,)}
        sizes |= {name: (part.images, *self._limits[name][1:]) for name in self._visual}
        for name in self._caches:
            _, heads, _, width = self._limits[name]
            sizes[name] = (part.rows, heads, part.length, width)

        self._k.array[:] = np.frombuffer(np.array([k], decoder.inputs[K]).tobytes(), np.uint8)
        layout = self._result_layout(rows, k)
        addresses = self._send(decoder, arrays)
        addresses |= layout.addresses(self._results.address) | {K: self._k.array.ctypes.data}
        addresses |= self._visual_layout.addresses(part.visual.address)
        past, present = part.caches[part.side], part.caches[1 - part.side]
        addresses |= self._cache_layout.addresses(past.address)
        for name, address in self._cache_layout.addresses(present.address).items():
            addresses[name.replace(PAST, PRESENT)] = address
        decoder.run(sizes, addresses, self.device.stream)

        received = self._received.array[: layout.size]
        self.device.download(self._results.address, received)
        self.device.synchronize()
        part.side, part.length = 1 - part.side, part.length + arrays[TOKENS].shape[1]
        logits, token_ids, logsumexp = (layout.view(received, name) for name in Candidates._fields)
        # Copied, because the next step overwrites what was received.
        return Candidates(logits.copy(), token_ids.astype(np.int64), logsumexp.copy())

    def gather_visual(self, part: _Part, images: Int64) -> None:
        """Move the visual keys/values of `images`, ascending, to the front of their part; the others are lost."""
        with self._lock:
            for name, address in self._visual_layout.addresses(part.visual.address).items():
                size = prod(self._limits[name][1:]) * self.decoder.inputs[name].itemsize  # of one image
                # In ascending order, no image overwrites one that is still to be moved.
                for place, image in enumerate(images.tolist()):
                    if place != image:
                        self.device.copy(address + image * size, address + place * size, size)
        part.images = len(images)

    def _send(self, plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """Copy inputs into page-locked memory and from there, in one piece, to the device; returns their addresses."""
        layout = Layout(plan.inputs, {name: array.shape for name, array in arrays.items()})
        for name, array in arrays.items():
            layout.view(self._sent.array, name)[...] = array
        self.device.upload(self._sent.array[: layout.size], self._inputs.address)
        return layout.addresses(self._inputs.address)

    def _allocate(self) -> tuple[Memory, tuple[Memory, Memory]]:
        """Device memory for one part: its visual keys/values, and the two sides of its cache."""
        visual, cache = self._visual_layout.size, self._cache_layout.size
        return self.device.allocate(visual), (self.device.allocate(cache), self.device.allocate(cache))

    def _result_layout(self, rows: int, k: int) -> Layout:
        shapes = zip(Candidates._fields, ((rows, k), (rows, k), (rows,)), strict=True)
        return Layout(self.decoder.outputs, dict(shapes))

    def _check_limits(self, rows: int, positions: int, k: int) -> None:
        for wanted, most, what, mend in (
            (rows, self.most_rows, "rows (images x beams)", "use fewer, or export with larger --max-beams"),
            (positions, self.most_positions, "tokens of prompt and caption", "export with larger --max-new-tokens"),
            (k, self.most_k, "candidates a row", "use fewer beams, a lower top_k or --engine onnxruntime"),
        ):
            if wanted > most:
                raise SearchError(f"{self.decoder.label}: at most {most} {what}, not {wanted}: {mend}")
