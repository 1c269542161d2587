"""The formats of caption files. `_FORMATS` recognises a file by its content; a new format is one reader and one row."""

from __future__ import annotations

import codecs
import glob
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, Field, StringConstraints, TypeAdapter

from ..runtime.errors import ItuneError, reading
from ..runtime.image import SUFFIXES
from .tables import CAPTION_NAMES, IMAGE_NAMES, read_table, table_layout


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
_WRONG_PHOTO = "2258277193_586949ec62.jpg.1"
"""A photo in Flickr8k's token file that the data set lacks."""
_TEXT_SUFFIXES = {".txt", ".token", ".json", ".jsonl", ".csv", ".tsv"}
_HEAD_BYTES = 1 << 16
_EXPECTED = (
    "expected a table such as 'image,caption' and on the next line 'photo.jpg,A dog runs', JSON Lines such as "
    '{"image": "photo.jpg", "captions": ["A dog runs"]}, a Flickr token file (photo.jpg#0 TAB caption), Karpathy\'s '
    "JSON, COCO or NoCaps annotations, or a folder with photo.txt beside each photo"
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


_Captions = Annotated[list[_Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]


class _JsonLine(BaseModel):
    image: _Photo = Field(validation_alias=AliasChoices(*IMAGE_NAMES))
    captions: _Captions = Field(validation_alias=AliasChoices(*CAPTION_NAMES))
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
_LIST = TypeAdapter(list[_JsonLine])
_BY_PHOTO = TypeAdapter(dict[_Photo, _Captions])


def find_caption_file(source: Path) -> Path:
    """Return a file itself, or the only caption file of a folder; split lists and other texts may lie beside it.

    A folder with a text file beside each photo stands for itself.
    """
    with reading(source, DataError):
        if not source.is_dir():
            return source
        names = sorted(path for path in source.iterdir() if path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES)
        # Flickr8k.lemma.token.txt lies beside the captions and contains dictionary forms.
        found = [path for path in names if ".lemma." not in path.name and _looks_like_captions(path)]
        photos_with_texts = not found and any(_texts_beside_photos(source))
    if len(found) == 1:
        return found[0]
    if photos_with_texts:
        return source
    listing = ", ".join(path.name for path in (found or names)[:8])
    mend = "name the one to read" if found else _EXPECTED
    raise DataError(f"{source}: contains {len(found)} caption files, not 1 (text files: {listing or 'none'}); {mend}")


def _looks_like_captions(path: Path) -> bool:
    with path.open("rb") as file:
        head = _decode(file.read(_HEAD_BYTES), errors="replace").lstrip()
    return any(row.mark(head) and row.name.search(path.name) for row in _FORMATS)


def _decode(content: bytes, errors: str = "strict") -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 with one."""
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig", errors=errors)


def read_entries(file: Path) -> list[Entry]:
    """Read the photos of a caption file in its order, each once. Raises DataError, naming the line or field."""
    with reading(file, DataError):
        if file.is_dir():
            return _merge(_read_texts_beside_photos(file), file)
        text = _decode(file.read_bytes()).replace("\r\n", "\n")
        head = text[:_HEAD_BYTES].lstrip()
        reader = next((row.read for row in _FORMATS if row.mark(head)), None)
        if reader is None:
            raise DataError(f"{file}: {f'starts with {head[:40]!a}' if head else 'is empty'}; {_EXPECTED}")
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
            if match["image"] != _WRONG_PHOTO:
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
            spelled = {unicodedata.normalize("NFC", name): name for name in known}
            names = [spelled.get(unicodedata.normalize("NFC", name), name) for name in names]
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


def _read_list(text: str, file: Path) -> list[Entry]:
    return _all_or_none([photo.entry(f"entry {i}") for i, photo in enumerate(_LIST.validate_json(text))], file)


def _read_objects(text: str, file: Path) -> list[Entry]:
    """Read an object of captions by photo, or else JSON Lines, whose errors name the line."""
    try:
        captions = _BY_PHOTO.validate_json(text)
    except ValueError:
        captions = {}
    if not all(name.lower().endswith(tuple(SUFFIXES)) for name in captions or [""]):
        return _read_jsonl(text, file)
    return [_JsonLine(image=image, captions=own).entry(image) for image, own in captions.items()]


def _read_table(text: str, file: Path) -> list[Entry]:
    layout = table_layout(text)
    assert layout is not None
    entries = []
    for row in read_table(text, layout):
        where = f"line {row.line}"
        with reading(f"{file}, {where}", DataError):
            photo = _JsonLine(image=row.image, captions=list(row.captions), split=row.split)
        entries.append(photo.entry(where))
    return _all_or_none(entries, file)


def caption_files(source: Path) -> list[Path]:
    """The files that `read_entries` reads: the caption file, or the texts beside photos."""
    return [text for _, text in _texts_beside_photos(source)] if source.is_dir() else [source]


def _texts_beside_photos(folder: Path) -> Iterable[tuple[Path, Path]]:
    """Yield (photo, text) for the photos in a folder, or below it, that have a text file of their name."""
    for text in sorted(folder.rglob("*.txt")):
        if any(part.startswith(".") for part in text.relative_to(folder).parts):
            continue
        for photo in sorted(text.parent.glob(f"{glob.escape(text.stem)}.*")):
            if photo.stem == text.stem and photo.suffix.lower() in SUFFIXES:
                yield photo, text


def _read_texts_beside_photos(folder: Path) -> list[Entry]:
    """Read the captions of each photo, one a line, from the text file of its name."""
    entries = []
    for photo, text in _texts_beside_photos(folder):
        name = photo.relative_to(folder).as_posix()
        with reading(text, DataError):
            captions = [line for _, line in _lines(_decode(text.read_bytes()))]
            entries.append(_JsonLine(image=name, captions=captions).entry(name))
    return entries


def _all_or_none(entries: list[Entry], file: Path) -> list[Entry]:
    without = [entry for entry in entries if entry.split is None]
    if without and len(without) < len(entries):
        raise DataError(
            f'{file}, {without[0].where}: has no "split", but other photos have one; give all photos a split, or none'
        )
    return entries


def _merge(entries: Sequence[Entry], file: Path) -> list[Entry]:
    """Merge the entries of each photo into one with all their captions."""
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
        captions.setdefault(name, []).extend(entry.captions)
    _require_unique(file, ((f"{entry.where} ({name})", "id", entry.id) for name, entry in merged.items()))
    return [replace(entry, captions=tuple(captions[name])) for name, entry in merged.items()]


class _Format(NamedTuple):
    mark: Callable[[str], object]
    """Whether this is the start of the file's text."""
    read: Callable[[str, Path], list[Entry]]
    name: re.Pattern[str] = re.compile("")
    """Must be found in a file's name where a folder is searched for its caption file."""


_PHOTO_KEY, _CAPTION_KEY = (rf'"(?:{"|".join(names)})"\s*:' for names in (IMAGE_NAMES, CAPTION_NAMES))

_FORMATS = (  # the first whose mark matches
    _Format(_TOKEN_LINE.match, _read_token_file),
    _Format(re.compile(r'\{(?=[^\n]*"image"\s*:)[^\n]*"captions"\s*:').match, _read_jsonl),
    _Format(re.compile(r'\{(?s:.)*?"sentences"\s*:').match, _read_karpathy),
    # COCO's other annotations (instances, keypoints) start with the same images.
    _Format(re.compile(r'\{(?s:.)*?"(?:images|annotations)"\s*:').match, _read_coco, re.compile("(?i)captions|nocaps")),
    _Format(re.compile(rf"\{{(?=[^\n]*{_PHOTO_KEY})[^\n]*{_CAPTION_KEY}").match, _read_jsonl),
    _Format(re.compile(rf"\[\s*\{{(?=(?s:.)*?{_PHOTO_KEY})(?s:.)*?{_CAPTION_KEY}").match, _read_list),
    _Format(re.compile(r"\{").match, _read_objects, re.compile("(?!)")),
    _Format(lambda head: (layout := table_layout(head)) and layout.header, _read_table),
    _Format(table_layout, _read_table, re.compile(r"(?i)\.[ct]sv$")),
)
