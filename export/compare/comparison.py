"""Export a checkpoint in several precisions and measure them against each other: size, captions, latency.

Everything goes to one folder: a bundle by its variant's name, and beside it NAME.json with its captions and fidelity,
which the next run takes up again if they are of the same bundles, photos and search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast, get_args

from pydantic import TypeAdapter, ValidationError

from ... import __version__
from ...checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from ...data.records import Record
from ...evaluate import score_captions
from ...files import atomic_path, hash_files
from ...runtime.bundle import MANIFEST, Bundle
from ...runtime.captioner import Captioner
from ...runtime.errors import ImageError, ItuneError
from ...runtime.image import decode, preprocess
from ...runtime.settings import Settings
from ...training.batches import encode_caption
from ..bundle import export_bundle
from ..options import ExportOptions
from ..quantize.rewrite import Precision
from ..vocabulary import Vocabulary
from .fidelity import Fidelity, measure_fidelity
from .stopwatch import Latency, measure_latency

REFERENCE: Precision = "fp32"
FIDELITY_PHOTOS = 100


class _Kept(Settings):
    """A part of NAME.json, and the hash of what it was computed from."""

    key: str
    result: dict[str, Any]


_KEPT = TypeAdapter(dict[str, _Kept])
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Told what is done next; told (done, total) while it is."""


@dataclass(frozen=True)
class Variant:
    """One way to export the checkpoint."""

    name: str
    precision: Precision
    vision_precision: Precision | None
    """None: what goes with `precision`."""
    vocabulary: str | None
    """As in `--vocabulary`."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Understand `PRECISION[+VISION][@N|FILE]`, such as int8, int4+fp32 or int8@5000."""
        precisions, at, vocabulary = text.strip().partition("@")
        decoder, plus, vision = precisions.partition("+")
        known = get_args(Precision)
        for part in (decoder, vision) if plus else (decoder,):
            if part not in known:
                raise ItuneError(f"--precisions {text}: {part!r} is none of {', '.join(known)}")
        if at and not vocabulary:
            raise ItuneError(f"--precisions {text}: give a number of tokens or a file of words after the @")
        name = f"{precisions}@{Path(vocabulary).name}" if at else precisions
        return cls(name, cast(Precision, decoder), cast(Precision, vision) if plus else None, vocabulary or None)


@dataclass(frozen=True)
class Row:
    """What was measured of a variant."""

    name: str
    megabytes: float
    cider: float | None
    """CIDEr-D and BLEU-4 in the COCO code's scale; None without reference captions."""
    bleu4: float | None
    photos: int
    """Those that can be read, of which the captions below are."""
    same_captions: float
    """Fraction of photos with the caption of the fp32 bundle."""
    fidelity: Fidelity
    """Against the fp32 bundle."""
    latency: Latency


@dataclass(frozen=True)
class Comparison:
    """A checkpoint, the photos to caption, and how."""

    checkpoint: Path
    folder: Path
    records: Sequence[Record]
    """Each with captions of its own, or none of them: then there are no scores."""
    data: Path | None
    """The captions whose train split shortlists are made from."""
    search: dict[str, Any]
    """Search options, as of `Captioner.caption`."""
    batch_size: int
    latency_photos: int
    threads: int | None
    verify: bool
    progress: Progress

    def run(self, variants: Sequence[Variant]) -> list[Row]:
        """Export what is missing, measure, and return a row for every variant, fp32 first.

        Raises:
            ItuneError: two variants with one name, no photo that can be read, a folder with bundles of another
                checkpoint, or whatever `export_bundle` raises.
        """
        reference = Variant(REFERENCE, REFERENCE, None, None)
        variants = [reference, *(variant for variant in variants if variant != reference)]
        names = [variant.name for variant in variants]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ItuneError(f"--precisions: {twice[0]} is there twice")
        bundles = {variant.name: self._export(variant) for variant in variants}
        captions = {name: self._captions(name, folder) for name, folder in bundles.items()}
        records = [record for record in self.records if record.id in captions[REFERENCE]]
        if not records:
            raise ItuneError(f"{self.records[0].image}: neither this photo nor any other can be read")
        fidelities = {name: self._fidelity(name, bundles, records, captions[REFERENCE]) for name in bundles}
        photos = [record.image for record in records[: self.latency_photos]]
        with self.progress("taking turns for the time") as update:
            latencies = measure_latency(bundles, photos, threads=self.threads, progress=update, **self.search)
        texts = {name: {key: written["caption"] for key, written in own.items()} for name, own in captions.items()}
        rows = []
        for name, folder in bundles.items():
            scores = score_captions(texts[name], records) if records[0].captions else None
            same = sum(texts[name][record.id] == texts[REFERENCE][record.id] for record in records)
            rows.append(
                Row(
                    name=name,
                    megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
                    cider=scores.cider if scores else None,
                    bleu4=scores.bleu[3] if scores else None,
                    photos=len(records),
                    same_captions=same / len(records),
                    fidelity=fidelities[name],
                    latency=latencies[name],
                )
            )
        return rows

    def _export(self, variant: Variant) -> Path:
        """The variant's bundle, which may be there already."""
        folder = self.folder / variant.name
        vocabulary = None if variant.vocabulary is None else Vocabulary.read(variant.vocabulary, self.data)
        if not (folder / MANIFEST).is_file():
            with self.progress(f"{variant.name}: exporting"):
                options = ExportOptions(
                    precision=variant.precision,
                    vision_precision=variant.vision_precision,
                    vocabulary=variant.vocabulary,
                    data=self.data,
                    verify=self.verify,
                )
                export_bundle(self.checkpoint, folder, options)
            return folder
        checkpoint = find_checkpoint(self.checkpoint)
        provenance = Bundle.load(folder).manifest.provenance
        source = {name: hash_files([checkpoint / name]) for name in (WEIGHTS_FILE, CONFIG_FILE)}
        found = [provenance.get(key) for key in ("checkpoint", "itune", "vocabulary")]
        if found != [source, __version__, vocabulary and vocabulary.sha256]:
            raise ItuneError(
                f"{folder} is of another checkpoint, vocabulary or itune: delete it, or give another --output"
            )
        return folder

    def _captions(self, name: str, folder: Path) -> dict[str, dict[str, Any]]:
        """Caption and tokens by record id, of the photos that can be read."""

        def caption() -> dict[str, dict[str, Any]]:
            captioner = Captioner.load(folder, threads=self.threads)
            images = [record.image for record in self.records]
            written = {}
            with self.progress(f"{name}: captioning") as update:
                found = captioner.stream(images, batch_size=self.batch_size, **self.search)
                for done, (record, (_, result)) in enumerate(zip(self.records, found, strict=True), 1):
                    if not isinstance(result, ImageError):
                        written[record.id] = {"caption": result.caption, "tokens": result.tokens}
                    update(done, len(images))
            return written

        photos = [[record.id, str(record.image.absolute())] for record in self.records]
        return self._kept(name, "captions", [_hash(folder), photos, self.search], caption)

    def _fidelity(
        self, name: str, bundles: dict[str, Path], records: Sequence[Record], written: dict[str, dict[str, Any]]
    ) -> Fidelity:
        """How `name` follows the reference through the first human caption of each photo, or else the reference's."""
        if name == REFERENCE:
            return Fidelity(kl=0.0, top1=1.0, covered=1.0, positions=0)
        records = records[:FIDELITY_PHOTOS]

        def measure() -> dict[str, Any]:
            reference, other = (Captioner.load(bundles[each], threads=self.threads) for each in (REFERENCE, name))
            text = Bundle.load(bundles[REFERENCE], verify=False).manifest.text
            examples = [
                (
                    preprocess(decode(record.image), reference.image),
                    encode_caption(reference.tokenizer, text, record.captions[0])
                    if record.captions
                    else written[record.id]["tokens"],
                )
                for record in records
            ]
            with self.progress(f"{name}: next tokens") as update:
                return asdict(
                    measure_fidelity(reference.engine, other.engine, examples, reference.tokens, progress=update)
                )

        hashes = [_hash(bundles[each]) for each in (REFERENCE, name)]
        photos = [[str(record.image.absolute()), record.captions[:1], written[record.id]] for record in records]
        return Fidelity(**self._kept(name, "fidelity", [*hashes, photos], measure))

    def _kept(self, name: str, part: str, inputs: list[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part of NAME.json if it was computed from the same inputs, else computed now and kept."""
        path = self.folder / f"{name}.json"
        content: dict[str, _Kept] = {}
        if path.exists():
            with suppress(ValidationError):  # not ours, or damaged: computed anew
                content = _KEPT.validate_json(path.read_bytes())
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        if part not in content or content[part].key != key:
            content[part] = _Kept(key=key, result=compute())
            with atomic_path(path) as temporary:
                temporary.write_bytes(_KEPT.dump_json(content, indent=1) + b"\n")
        return content[part].result


def _hash(bundle: Path) -> str:
    """Of a whole bundle, since its manifest has the hashes of its files."""
    return hash_files([bundle / MANIFEST])
