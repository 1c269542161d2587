"""Export a checkpoint in several precisions and compare the bundles: size, captions, latency.

A folder holds the bundles and, beside each, NAME.json with its captions and fidelity. The next run uses them again if
the bundles, photos and search are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ... import __version__
from ...checkpoint import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from ...data.records import Record
from ...evaluate import score_captions
from ...files import atomic_path, hash_files
from ...runtime.bundle import MANIFEST, Bundle
from ...runtime.captioner import Captioner
from ...runtime.errors import ItuneError, reading
from ...runtime.image import decode, preprocess
from ...runtime.settings import Settings
from ...runtime.text import encode_caption
from ..bundle import export_bundle
from ..options import CompareOptions, ExportOptions
from ..verify.captions import caption_photos
from ..vocabulary import Vocabulary
from .fidelity import Example, Fidelity, measure_fidelity
from .stopwatch import Latency, measure_latency

REFERENCE = "fp32"
FIDELITY_PHOTOS = 100
_Captions = dict[str, dict[str, Any]]
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Called with a stage's name; the context receives (done, total)."""


class _Cached(Settings):
    """A part of NAME.json, and the hash of its inputs."""

    key: str
    result: dict[str, Any]


_CACHE = TypeAdapter(dict[str, _Cached])


def parse_variants(options: CompareOptions) -> dict[str, ExportOptions]:
    """The variants of `--precisions`, such as int8, int4+fp32 or int8@5000, by their names, fp32 first."""
    variants: dict[str, ExportOptions] = {}
    for text in (REFERENCE, *options.precisions.split(",")):
        precisions, at, vocabulary = text.strip().partition("@")
        decoder, plus, vision = precisions.partition("+")
        name = f"{precisions}@{Path(vocabulary).name}" if at else precisions
        if name in variants and name != REFERENCE:
            raise ItuneError(f"--precisions: {name} is repeated")
        content = {
            "precision": decoder,
            "vision_precision": vision if plus else None,
            "vocabulary": vocabulary if at else None,
            "data": options.data if at else None,
            "verify": options.verify,
        }
        with reading(f"--precisions {text}"):
            variants[name] = ExportOptions.model_validate(content)
    return variants


@dataclass(frozen=True)
class Row:
    """A variant's measurements."""

    name: str
    megabytes: float
    cider: float | None
    """CIDEr-D and BLEU-4 in the COCO code's scale; None without reference captions."""
    bleu4: float | None
    photos: int
    """Photos that can be read."""
    same_captions: float
    """Fraction of photos with the same caption as the fp32 bundle's."""
    fidelity: Fidelity
    """Against the fp32 bundle."""
    latency: Latency


@dataclass(frozen=True)
class Comparison:
    """A checkpoint, the photos to caption, and the options."""

    checkpoint: Path
    folder: Path
    records: Sequence[Record]
    """Either all have captions, or none: then there are no scores."""
    options: CompareOptions
    search: dict[str, Any]
    """Options of `Captioner.caption`."""
    progress: Progress

    def run(self) -> list[Row]:
        """Export missing bundles, measure, and return a row for every variant, fp32 first.

        Raises:
            ItuneError: two variants have the same name, no photo can be read, the folder has bundles of another
                checkpoint, or an export fails.
        """
        variants, threads = parse_variants(self.options), self.options.threads
        bundles = {name: self._export(name, options) for name, options in variants.items()}
        captions = {name: self._captions(name, folder) for name, folder in bundles.items()}
        records = [record for record in self.records if record.id in captions[REFERENCE]]
        fidelities = {name: self._fidelity(name, bundles, records, captions[REFERENCE]) for name in bundles}
        photos = [record.image for record in records[: self.options.latency_photos]]
        with self.progress("measuring latency") as update:
            latencies = measure_latency(bundles, photos, threads=threads, progress=update, **self.search)
        texts = {name: {key: written["caption"] for key, written in own.items()} for name, own in captions.items()}
        rows = []
        for name, folder in bundles.items():
            scores = score_captions(texts[name], records) if records[0].captions else {}
            same = sum(texts[name][record.id] == texts[REFERENCE][record.id] for record in records)
            rows.append(
                Row(
                    name=name,
                    megabytes=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
                    cider=scores.get("cider"),
                    bleu4=scores.get("bleu4"),
                    photos=len(records),
                    same_captions=same / len(records),
                    fidelity=fidelities[name],
                    latency=latencies[name],
                )
            )
        return rows

    def _export(self, name: str, options: ExportOptions) -> Path:
        """A variant's bundle, exported unless an earlier run did."""
        folder = self.folder / name
        if not (folder / MANIFEST).is_file():
            with self.progress(f"{name}: exporting"):
                export_bundle(self.checkpoint, folder, options)
            return folder
        checkpoint, provenance = find_checkpoint(self.checkpoint), Bundle.load(folder).manifest.provenance
        source = {name: hash_files([checkpoint / name]) for name in (WEIGHTS_FILE, CONFIG_FILE)}
        vocabulary = Vocabulary.read(options.vocabulary, options.data).sha256 if options.vocabulary else None
        if [provenance.get(key) for key in ("checkpoint", "itune", "vocabulary")] != [source, __version__, vocabulary]:
            raise ItuneError(
                f"{folder} has a bundle of another checkpoint, vocabulary or itune: delete it, or choose another "
                "--output"
            )
        return folder

    def _captions(self, name: str, folder: Path) -> _Captions:
        """The fields of `Written` by record id, without photos that cannot be read."""
        photos = {record.id: record.image.absolute() for record in self.records}

        def caption() -> dict[str, Any]:
            captioner = Captioner.load(folder, threads=self.options.threads)
            with self.progress(f"{name}: captioning") as update:
                written = caption_photos(captioner, photos, update, batch_size=self.options.batch_size, **self.search)
            return {key: each.model_dump() for key, each in written.items()}

        inputs = [_hash(folder), [[key, str(photo)] for key, photo in photos.items()], self.search]
        return self._cached(name, "captions", inputs, caption)

    def _fidelity(self, name: str, bundles: dict[str, Path], records: Sequence[Record], written: _Captions) -> Fidelity:
        """Compare `name` with the reference on each photo's first human caption, or on the reference's own caption."""
        if name == REFERENCE:
            return Fidelity(kl=0.0, top1=1.0, covered=1.0, positions=0)
        records = records[:FIDELITY_PHOTOS]

        def measure() -> dict[str, Any]:
            threads = self.options.threads
            reference, other = (Captioner.load(bundles[each], threads=threads) for each in (REFERENCE, name))
            text = Bundle.load(bundles[REFERENCE], verify=False).manifest.text
            examples: list[Example] = []
            for record in records:
                own = written[record.id]["tokens"]
                caption = encode_caption(reference.tokenizer, text, record.captions[0]) if record.captions else own
                examples.append((preprocess(decode(record.image), reference.image), caption))
            with self.progress(f"{name}: next tokens") as update:
                engines = reference.engine, other.engine
                return asdict(measure_fidelity(*engines, examples, reference.tokens, progress=update))

        hashes = [_hash(bundles[each]) for each in (REFERENCE, name)]
        photos = [[str(record.image.absolute()), record.captions[:1], written[record.id]] for record in records]
        return Fidelity(**self._cached(name, "fidelity", [*hashes, photos], measure))

    def _cached(self, name: str, part: str, inputs: list[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part of NAME.json, computed again if the inputs have changed."""
        path = self.folder / f"{name}.json"
        content: dict[str, _Cached] = {}
        with suppress(FileNotFoundError, ValidationError):  # a file that is damaged or not ours is overwritten
            content = _CACHE.validate_json(path.read_bytes())
        key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
        if part not in content or content[part].key != key:
            content[part] = _Cached(key=key, result=compute())
            with atomic_path(path) as temporary:
                temporary.write_bytes(_CACHE.dump_json(content, indent=1) + b"\n")
        return content[part].result


def _hash(bundle: Path) -> str:
    """A bundle's identity: its manifest has the hashes of its files."""
    return hash_files([bundle / MANIFEST])
