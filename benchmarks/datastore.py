"""Search time of a datastore, and recall of an approximate index.

    python benchmarks/datastore.py --entries 1000000

Entries are synthetic, but clustered as caption embeddings are: topics in a space of few directions, some far more
common than others, photos of a topic, and five captions around each photo. Queries are other photos of the same topics,
shifted by one vector, as CLIP's image features are shifted from its text features. The table shows how similar
neighbours and random entries are. Recall is relative to NumPy's exact search over the same embeddings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from itune.retrieval.build import FLAT_ENTRIES
from itune.retrieval.writers import write_index, write_rows, write_texts
from itune.runtime.manifest import FileHash
from itune.runtime.retrieval.datastore import EMBEDDINGS, ENTRIES, MANIFEST, Datastore, DatastoreManifest, centre
from itune.runtime.retrieval.nearest import Ranking
from itune.runtime.settings import EncoderIdentity

Floats = NDArray[np.float32]
TOPICS, DIRECTIONS, CAPTIONS = 2_000, 128, 5
_CHUNK = 50_000


class SyntheticEmbeddings:
    """Topics in a space of few directions, photos in a topic, captions of a photo."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        rng = self.rng = np.random.default_rng(seed)
        basis = rng.normal(size=(DIRECTIONS, dim)) * np.linspace(1, 0.2, DIRECTIONS)[:, None]
        self.topics = (rng.normal(size=(TOPICS, DIRECTIONS)) @ basis).astype(np.float32)
        self.topics /= np.linalg.norm(self.topics, axis=1, keepdims=True)
        self.basis = (basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32)
        self.common, self.gap = rng.normal(size=(2, dim)).astype(np.float32) / np.sqrt(dim)
        # Some topics are far more common than others.
        self.weights = 1 / np.arange(1, TOPICS + 1) ** 0.7
        self.weights /= self.weights.sum()

    def photos(self, count: int) -> Floats:
        """The contents of `count` photos, [count, dim]."""
        topics = self.topics[self.rng.choice(TOPICS, count, p=self.weights)]
        own = self.rng.normal(size=(count, DIRECTIONS)).astype(np.float32) @ self.basis
        return topics + 0.6 * own / np.linalg.norm(own, axis=1, keepdims=True)

    def views(self, photos: Floats, spread: float, offset: Floats) -> Floats:
        """One embedding of length 1 per photo: its content, noise, and the shift of the modality."""
        noise = self.rng.normal(size=photos.shape).astype(np.float32)
        noise *= spread / np.sqrt(photos.shape[1])
        return centre(photos + noise + offset, None)

    def entries(self, count: int) -> Iterator[Floats]:
        """`count` captions' embeddings, five in a row for each photo."""
        for start in range(0, count, _CHUNK):
            rows = min(_CHUNK, count - start)
            shown = np.repeat(self.photos(-(-rows // CAPTIONS)), CAPTIONS, axis=0)[:rows]
            yield self.views(shown, 0.6, self.common)

    def queries(self, count: int) -> Floats:
        """`count` embeddings of images."""
        return self.views(self.photos(count), 0.6, self.common + self.gap)


def make_store(folder: Path, made: SyntheticEmbeddings, entries: int, dim: int) -> float:
    """Write a datastore of synthetic captions; returns the seconds that its index took."""
    folder.mkdir(parents=True)
    approximate = entries > FLAT_ENTRIES
    write_rows(folder / EMBEDDINGS, np.float16 if approximate else np.float32, (entries, dim), made.entries(entries))
    numbers = np.arange(entries)
    np.save(folder / ENTRIES, np.stack([numbers // CAPTIONS, numbers, numbers + 1], axis=1))
    write_texts(folder, "captions", (f"caption {i} of a photo, with as many words as usual" for i in range(entries)))
    write_texts(folder, "images", map(str, range(-(-entries // CAPTIONS))))
    start = perf_counter()
    nprobe = write_index(folder, None, lambda *_: None) if approximate else 0
    seconds = perf_counter() - start
    manifest = DatastoreManifest(
        kind="text",
        encoder=EncoderIdentity(source="synthetic", sha256="0" * 64, pooling="projection", dim=dim),
        entries=entries,
        captions=entries,
        images=-(-entries // CAPTIONS),
        index="ivf" if approximate else "flat",
        nprobe=nprobe,
        centered=False,
        files={path.name: FileHash.of(path) for path in folder.iterdir()},
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return seconds


def measure(store: Datastore, queries: Floats, k: int) -> dict[str, Any]:
    """Milliseconds of single searches through `Datastore.search`, and recall against the exact search."""
    for query in queries[:5]:
        store.search(query[None], k)
    times, found = [], []
    for query in queries:
        start = perf_counter()
        (captions,) = store.search(query[None], k)
        times.append(1000 * (perf_counter() - start))
        found.append({int(each.caption.split()[1]) for each in captions})
    exact = Ranking(store.embeddings, queries)
    hits, similarities = [], []
    for i, approximate in enumerate(found):
        entries, scores = exact.best(i, k)
        hits.append(len(approximate & set(entries.tolist())) / k)
        similarities.append(scores)
    quantiles = np.percentile(times, [50, 95])
    return {
        "ms_median": float(quantiles[0]),
        "ms_p95": float(quantiles[1]),
        f"recall@{k}": statistics.mean(hits),
        "similarity_first": float(np.mean([scores[0] for scores in similarities])),
        "similarity_last": float(np.mean([scores[-1] for scores in similarities])),
        "similarity_random": float(np.mean(queries @ np.asarray(store.embeddings[:1000], np.float32).T)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[30_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512, help="width of the embeddings; CLIP's is 512 or 768")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("-k", type=int, default=4)
    parser.add_argument("--nprobe", type=int, nargs="*", default=[], help="also measure these numbers of probed lists")
    parser.add_argument("--work-dir", type=Path, help="keep and reuse the datastores here")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for entries in arguments.entries:
            made = SyntheticEmbeddings(arguments.dim)
            folder = (arguments.work_dir or Path(temporary)) / f"{entries}x{arguments.dim}"
            seconds = None if folder.exists() else make_store(folder, made, entries, arguments.dim)
            start = perf_counter()
            store = Datastore.load(folder)
            loading = 1000 * (perf_counter() - start)
            made.rng = np.random.default_rng(1)
            queries = made.queries(arguments.queries)
            own = store.manifest.nprobe
            for nprobe in [own, *(arguments.nprobe if own else [])]:
                if own:
                    store._index.nprobe = nprobe
                result = {"entries": entries, "index": store.manifest.index, "nprobe": nprobe, "load_ms": loading}
                result |= {"index_seconds": seconds, **measure(store, queries, arguments.k)}
                results.append(result)
    table = Table(title=f"{arguments.queries} single queries, {arguments.dim} wide, k = {arguments.k}")
    for name in results[0]:
        table.add_column(name, justify="right")
    for result in results:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in result.values()))
    Console(width=200).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
