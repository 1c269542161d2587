"""The data sets of a training run, as the flags of itune-train name them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from ..runtime.errors import ItuneError
from . import common
from .program import Options, Switch

if TYPE_CHECKING:
    from ..data.records import Record

    Sets = Mapping[Path, Sequence[Record]]
    """Records by the file or folder that they are from."""

_Weight = Annotated[float, Field(gt=0, le=1000)]
_NO_DEFAULT = Parameter(show_default=False)


class DataSets(Options, title="Data"):
    """Where photos and captions come from."""

    data: tuple[Path, ...]
    """Captions: CSV, JSONL, Flickr8k/30k token file, Karpathy or COCO JSON, or a folder with one of these; again for
    further data sets."""
    data_weight: Annotated[tuple[_Weight, ...], _NO_DEFAULT] = ()
    """How many times an epoch draws each photo of a data set, such as 2 or 0.5, once for every --data. Default: 1."""
    images: Annotated[tuple[Path, ...], _NO_DEFAULT] = ()
    """Folder of the photos, once for all data sets or once for every --data, then every --dev-data. Default: beside the
    captions."""
    skip_missing: Switch = False
    """Leave out photos that do not exist."""
    dev_data: Annotated[tuple[Path, ...], _NO_DEFAULT] = ()
    """Captions of the dev split, if in a file of their own; again for further dev sets, of which the mean counts."""
    dev_fraction: float | None = None
    """Hold out this fraction of the training photos of each data set as dev split."""
    dev_images: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on only the first N photos of each dev set."""
    cache_features: Path | None = None
    """Compute visual embeddings once and keep them (fp16) in this folder."""

    def load(self, seed: int) -> tuple[Sets, Sets]:
        """The training and the dev records, by file."""
        from ..data.records import identical_photos, load_records, short_names, split_records

        for files in filter(None, (self.data, self.dev_data)):
            short_names(files)  # refuses a file that is named twice
        if self.dev_data and self.dev_fraction is not None:
            raise ItuneError("--dev-data contradicts --dev-fraction: name a file or hold out a fraction")
        weights = self.data_weight or [1.0] * len(self.data)
        if len(weights) != len(self.data):
            raise ItuneError(f"{len(weights)} --data-weight for {len(self.data)} --data: give one for each")
        files = (*self.data, *self.dev_data)
        if len(self.images) not in (0, 1, len(files)):
            raise ItuneError(
                f"{len(self.images)} --images for {len(files)} --data and --dev-data: name one folder for all, or one "
                "for each"
            )
        folders = self.images * len(files) if len(self.images) == 1 else self.images or (None,) * len(files)
        train_folders, dev_folders = folders[: len(self.data)], folders[len(self.data) :]

        def load(
            files: Sequence[Path], folders: Sequence[Path | None], split: str | None, **options: Any
        ) -> dict[Path, list[Record]]:
            options |= {"split": split, "skip_missing": self.skip_missing}
            return {
                file: load_records(file, images=folder, **options) for file, folder in zip(files, folders, strict=True)
            }

        train = load(self.data, train_folders, split="train")
        if self.dev_fraction is not None:
            splits = {file: split_records(records, self.dev_fraction, seed) for file, records in train.items()}
            train, dev = ({file: split[side] for file, split in splits.items()} for side in (0, 1))
        elif self.dev_data:
            dev = load(self.dev_data, dev_folders, split=None)
        else:
            mend = "name a dev split with --dev-data, or hold one out with --dev-fraction 0.1"
            dev = load(self.data, train_folders, split="dev", mend=mend)
        train = {
            file: [replace(record, weight=weight) for record in records]
            for (file, records), weight in zip(train.items(), weights, strict=True)
        }
        dev = {file: records[: self.dev_images] for file, records in dev.items()}
        same = identical_photos(photos(train) + photos(dev))
        trained = {same[photo] for photo in photos(train)}
        if known := [photo for photo in photos(dev) if same[photo] in trained]:
            common.warn(
                f"{len(known)} of {len(photos(dev))} dev photos are also training photos, such as {known[0]}: dev "
                "scores will be too good"
            )
        return train, dev


def photos(sets: Sets) -> list[Path]:
    """The photos of all sets."""
    return [record.image for records in sets.values() for record in records]


def readable(sets: Sets, unreadable: Collection[Path]) -> dict[str, list[Record]]:
    """The records of readable photos, by the name of their set."""
    from ..data.records import short_names

    found = {}
    for (file, records), name in zip(sets.items(), short_names([*sets]), strict=True):
        found[name] = [record for record in records if record.image not in unreadable]
        if not found[name]:
            raise ItuneError(f"{file}: none of the {len(records)} photos can be read")
    return found


def count(sets: Mapping[str, Sequence[Record]]) -> str:
    """The number of photos, of several sets with each one's own."""
    sizes = {name: len(records) for name, records in sets.items()}
    each = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{sum(sizes.values())}" + (f" ({each})" if len(sizes) > 1 else "")
