"""The formats of caption files. `_FORMATS` recognises a file by its content; a new format is one reader and one row."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter

from ..runtime.errors import ItuneError, reading


class DataError(ItuneError):
    """A caption file, one of its fields, or one of its photos cannot be used."""


@dataclass(frozen=True)
class Entry:
    """A photo in a caption file; `names` are its possible paths in the image folder, `where` is its line or field."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    id: str
    split: str | None
    where: str
    domain: str | None = None


_SPLIT_NAMES = {
    **dict.fromkeys(("training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "dev"),
    "testing": "test",
}
_TOKEN_LINE = re.compile(r"(?P<image>[^\t\n]+)#\d+\t(?P<caption>.*)")
_TEXT_SUFFIXES = {".txt", ".token", ".json", ".jsonl"}
_HEAD_BYTES = 1 << 16
_EXPECTED = (
    "expected a Flickr token file (photo.jpg#0 TAB caption), Karpathy's JSON, COCO or NoCaps annotations, or JSON "
    'Lines of {"image": "photo.jpg", "captions": ["..."]}'
)


def split_name(name: str) -> str:
    """Return a split's usual name: "dev" for "val", "train" for Karpathy's "restval"."""
    return _SPLIT_NAMES.get(name.lower(), name.lower())


def _split_in_file_name(file_name: str) -> str | None:
    """Find the split in a file name such as val2014 or trainImages; part of a word, as in latest, does not count."""
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", "_", file_name).lower())
    splits = {split_name(re.sub("(?:set|split)$", "", word)) for word in words}
    return next((split for split in ("train", "dev", "test") if split in splits), None)


# pydantic refuses lone surrogates in strings.
_Text = Annotated[str, StringConstraints(strip_whitespace=True)]
_Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
_Id = Annotated[_Name, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
_Photo = Annotated[_Name, AfterValidator(lambda name: str(PurePosixPath(name)))]  # "./a.jpg" and "a.jpg" are the same
_Split = Annotated[_Text | None, AfterValidator(lambda split: split_name(split) if split else None)]


class _JsonLine(BaseModel):
    image: _Photo
    captions: Annotated[list[_Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    id: _Id | None = None
    split: _Split = None
    domain: _Text | None = None

    def entry(self, where: str) -> Entry:
        key = self.id or _stem(self.image)
        return Entry((self.image,), tuple(self.captions), key, self.split, where, self.domain or None)


class _Sentence(BaseModel):
    raw: _Text


class _KarpathyImage(BaseModel):
    filename: _Photo
    sentences: list[_Sentence]
    filepath: _Text = ""
    cocoid: _Id | None = None
    imgid: _Id | None = None
    split: _Split = None


class _Karpathy(BaseModel):
    images: Annotated[list[_KarpathyImage], Field(min_length=1)]


class _CocoImage(BaseModel):
    id: _Id
    file_name: _Photo | None = None
    domain: _Text | None = None


class _Caption(BaseModel):
    image_id: _Id
    caption: _Text


class _Coco(BaseModel):
    images: Annotated[list[_CocoImage], Field(min_length=1)]
    annotations: list[_Caption] = []


_RESULTS = TypeAdapter(Annotated[list[_Caption], Field(min_length=1)])


def find_caption_file(source: Path) -> Path:
    """Return a file itself, or the only caption file of a folder; split lists and other texts may lie beside it."""
    with reading(source, DataError):
        if not source.is_dir():
            return source
        names = sorted(path for path in source.iterdir() if path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES)
        # Flickr8k.lemma.token.txt lies beside the captions and contains dictionary forms.
        found = [path for path in names if ".lemma." not in path.name and _looks_like_captions(path)]
    if len(found) == 1:
        return found[0]
    listing = ", ".join(path.name for path in (found or names)[:8])
    mend = "name the one to read" if found else _EXPECTED
    raise DataError(f"{source}: contains {len(found)} caption files, not 1 (text files: {listing or 'none'}); {mend}")


def _looks_like_captions(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    return any(row.mark.match(head) and row.name.search(path.name) for row in _FORMATS)


def read_entries(file: Path) -> list[Entry]:
    """Read the photos of a caption file in its order, each once. Raises DataError, naming the line or field."""
    with reading(file, DataError):
        text = file.read_text(encoding="utf-8-sig")
        head = text[:_HEAD_BYTES].lstrip()
        reader = next((row.read for row in _FORMATS if row.mark.match(head)), None)
        if reader is None:
            raise DataError(f"{file}: starts with {head[:20]!a}; {_EXPECTED}")
        return _merge(reader(text, file), file)


def read_results(file: Path) -> dict[str, str]:
    """Read captions by image id from COCO's results format: `[{"image_id": 42, "caption": "..."}, ...]`.

    Raises DataError, naming the entry, for anything else, and for a second caption of an image.
    """
    with reading(
        file, DataError, mend='expected a list of {"image_id": ..., "caption": "..."}, COCO\'s results format'
    ):
        results = _RESULTS.validate_json(file.read_text(encoding="utf-8-sig"))
        _require_unique(file, ((f"entry {i}", "image_id", result.image_id) for i, result in enumerate(results)))
    return {result.image_id: result.caption for result in results}


def _require_unique(file: Path, keys: Iterable[tuple[str, str, str]]) -> None:
    """Raise DataError unless each (kind, key) occurs at one place only; `keys` are (place, kind, key)."""
    first: dict[tuple[str, str], str] = {}
    for where, kind, key in keys:
        if (owner := first.setdefault((kind, key), where)) != where:
            raise DataError(f"{file}, {where}: {kind} {key!a} is already used by {owner}; remove one of the two")


def _lines(text: str) -> Iterable[tuple[str, str]]:
    """Yield ("line 3", its text) for every line that is not blank."""
    return ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_token_file(text: str, file: Path) -> list[Entry]:
    entries = []
    for where, line in _lines(text):
        with reading(f"{file}, {where}", DataError):
            match = _TOKEN_LINE.fullmatch(line)
            if match is None:
                raise ValueError(f"expected photo.jpg#0 TAB caption, not {line[:40]!a}")
            entries.append(_JsonLine(image=match["image"], captions=[match["caption"]]).entry(where))
    known = {entry.names[0] for entry in entries} | {entry.id for entry in entries}
    splits = _read_split_lists(file, known)
    return [replace(entry, split=splits.get(entry.names[0], splits.get(entry.id))) for entry in entries]


def _read_split_lists(token_file: Path, known: set[str]) -> dict[str, str]:
    """Map photos to splits by the lists beside a token file: a photo per line, the split in the list's file name."""
    splits: dict[str, str] = {}
    keys: list[tuple[str, str, str]] = []
    for path in sorted(token_file.parent.glob("*.txt")):
        split = _split_in_file_name(path.name)
        if split is None or path == token_file or not path.is_file():
            continue
        with reading(path, DataError):
            names = [line.strip() for _, line in _lines(path.read_text(encoding="utf-8-sig"))]
        if known.isdisjoint(names):
            continue  # some other text
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"{path}: {len(unknown)} of {len(names)} photos have no caption in {token_file.name} (the first: "
                f"{unknown[0]!a}); remove them from the list"
            )
        keys += [(path.name, "split", split), *((path.name, "photo", name) for name in names)]
        splits |= dict.fromkeys(names, split)
    _require_unique(token_file.parent, keys)
    return splits


def _read_karpathy(text: str, file: Path) -> list[Entry]:
    entries = []
    for i, image in enumerate(_Karpathy.model_validate_json(text).images):
        name, folder = image.filename, image.filepath
        names = (str(PurePosixPath(folder, name)), name) if folder else (name,)
        captions = tuple(sentence.raw for sentence in image.sentences)
        key = image.cocoid or image.imgid or _stem(name)
        entries.append(Entry(names, captions, key, image.split, f"images.{i}"))
    return _all_or_none(entries, file)


def _read_coco(text: str, file: Path) -> list[Entry]:
    """Read COCO's annotation format and NoCaps', which adds domains; a test split has no annotations.

    The file's name contains the split. Files of references may leave photo names out, as scoring needs none.
    """
    document = _Coco.model_validate_json(text)
    captions: dict[str, list[str]] = {image.id: [] for image in document.images}
    for i, annotation in enumerate(document.annotations):
        if annotation.image_id not in captions:
            raise DataError(f"{file}, annotations.{i}: no image has the id {annotation.image_id!a}")
        captions[annotation.image_id].append(annotation.caption)
    split = _split_in_file_name(file.stem)
    entries = []
    keys = []
    for i, image in enumerate(document.images):
        name, where = image.file_name or image.id, f"images.{i}"
        keys += [(where, "id", image.id), (where, "file_name", name)]
        entries.append(Entry((name,), tuple(captions[image.id]), image.id, split, where, image.domain or None))
    _require_unique(file, keys)
    return entries


def _read_jsonl(text: str, file: Path) -> list[Entry]:
    entries = []
    for where, line in _lines(text):
        with reading(f"{file}, {where}", DataError):
            entries.append(_JsonLine.model_validate_json(line).entry(where))
    return _all_or_none(entries, file)


def _all_or_none(entries: list[Entry], file: Path) -> list[Entry]:
    without = [entry for entry in entries if entry.split is None]
    if without and len(without) < len(entries):
        raise DataError(
            f'{file}, {without[0].where}: has no "split", but other photos have one; give all photos a split, or none'
        )
    return entries


def _merge(entries: Sequence[Entry], file: Path) -> list[Entry]:
    """Merge the entries of each photo into one with all their captions, except those without a word, such as "."."""
    merged: dict[str, Entry] = {}
    captions: dict[str, list[str]] = {}
    for entry in entries:
        name = entry.names[0]
        first = merged.setdefault(name, entry)
        if first.split != entry.split:
            raise DataError(
                f"{file}, {entry.where}: puts {name} into {entry.split!r}, but {first.where} into {first.split!r}; "
                "a photo has one split"
            )
        captions.setdefault(name, []).extend(text for text in entry.captions if any(map(str.isalnum, text)))
    _require_unique(file, ((f"{entry.where} ({name})", "id", entry.id) for name, entry in merged.items()))
    return [replace(entry, captions=tuple(captions[name])) for name, entry in merged.items()]


class _Format(NamedTuple):
    mark: re.Pattern[str]
    """Matches the start of the file's text."""
    read: Callable[[str, Path], list[Entry]]
    name: re.Pattern[str] = re.compile("")
    """Must be found in a file's name where a folder is searched for its caption file."""


_FORMATS = (  # the first whose mark matches
    _Format(_TOKEN_LINE, _read_token_file),
    _Format(re.compile(r'\{(?=[^\n]*"image"\s*:)[^\n]*"captions"\s*:'), _read_jsonl),
    _Format(re.compile(r'\{(?s:.)*?"sentences"\s*:'), _read_karpathy),
    # COCO's other annotations (instances, keypoints) start with the same images.
    _Format(re.compile(r'\{(?s:.)*?"(?:images|annotations)"\s*:'), _read_coco, re.compile("(?i)captions|nocaps")),
    _Format(re.compile(r"\{"), _read_jsonl, re.compile("(?!)")),
)
