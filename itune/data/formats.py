"""The formats that captions come in; which one a file has is told from its content."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.errors import ItuneError


class DataError(ItuneError):
    """A caption file, one of its fields, or a photo that it names cannot be used."""


@dataclass(frozen=True)
class Entry:
    """A photo as a caption file describes it; `names` are the places that it may have below the image folder."""

    names: tuple[str, ...]
    captions: tuple[str, ...]
    id: str
    split: str | None
    where: str
    domain: str | None = None


_SPLIT_NAMES = {"restval": "train", "training": "train", "val": "dev", "valid": "dev", "validation": "dev"}
_LIST_NAMES = {
    # val2014, captions_test, trainImages: words of their own, and no parts of latest, retrieval or constraints.
    split: re.compile(rf"(?<![a-z])(?:{names})(?:set|split)?(?![a-z])")
    for split, names in (("train", "train|training"), ("dev", "dev|val|valid|validation"), ("test", "test|testing"))
}
_TOKEN_LINE = re.compile(r"(?P<image>[^\t\n]+)#\d+\t(?P<caption>.*)")
_COCO_NAME = re.compile("captions|nocaps")
_TEXT_SUFFIXES = {".txt", ".token", ".json", ".jsonl"}
_HEAD_BYTES = 1 << 16
_EXPECTED = (
    "a Flickr token file (photo.jpg#0 TAB caption), Karpathy's JSON, COCO's or NoCaps' annotations, or JSON Lines of "
    '{"image": "photo.jpg", "captions": ["..."]}'
)


def holds(check: Callable[[], bool]) -> bool:
    """The answer of `Path.is_file` or `is_dir`; False for a name too long to be a file's, where they raise."""
    try:
        return check()
    except OSError:
        return False


def split_name(name: str) -> str:
    """The split's usual name: "dev" for "val", "train" for Karpathy's "restval"."""
    return _SPLIT_NAMES.get(name.lower(), name.lower())


def _named_split(file_name: str) -> str | None:
    """The split that a file's name tells."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", file_name).lower()
    return next((split for split, pattern in _LIST_NAMES.items() if pattern.search(words)), None)


def find_caption_file(folder: Path) -> Path:
    """The one caption file of a folder; split lists and other texts may lie beside it."""
    try:
        names = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in _TEXT_SUFFIXES)
        # Flickr8k.lemma.token.txt lies beside the captions and holds dictionary forms: no text to learn from.
        found = [path for path in names if ".lemma." not in path.name and _looks_like_captions(path)]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{folder}: holds several caption files ({_listing(found)}); name the one to read")
    others = (
        f"its text files are {_listing(names)}" if names else "there is no .txt, .token, .json or .jsonl file in it"
    )
    raise DataError(f"{folder}: holds no caption file ({others}); expected {_EXPECTED}")


def _listing(paths: Sequence[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:8])
    return f"{shown} and {len(paths) - 8} more" if len(paths) > 8 else shown


def _looks_like_captions(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES).decode("utf-8-sig", errors="replace").lstrip()
    is_json = head.startswith("{") and ('"sentences"' in head or ('"image"' in head and '"captions"' in head))
    # COCO's other annotations (instances, keypoints) begin with the same images.
    is_json |= head.startswith("{") and '"file_name"' in head and bool(_COCO_NAME.search(path.name.lower()))
    return is_json or bool(_TOKEN_LINE.match(head))


def _read_text(file: Path, expected: str = _EXPECTED) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 text (byte {error.start}); expected {expected}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None


def read_entries(file: Path) -> list[Entry]:
    """The photos of a caption file in its order, each once. Raises DataError, naming the line or field."""
    return _merge(_parse(file), file)


def _parse(file: Path) -> list[Entry]:
    text = _read_text(file)
    start = text.lstrip()
    if _TOKEN_LINE.match(start):
        return _read_token_file(text, file)
    if not start.startswith(("{", "[")):
        raise DataError(f"{file}: {'holds no captions' if start else 'is empty'}; expected {_EXPECTED}")
    whole = _parse_json(text)
    if isinstance(whole, dict) and "images" in whole:
        if "annotations" in whole or (isinstance(whole["images"], list) and _has_file_name(whole["images"][:1])):
            return _read_coco(whole, file)
        return _all_or_none(_read_karpathy(whole, file), file)
    if isinstance(whole, Exception) and isinstance(_parse_json(start.partition("\n")[0]), Exception):
        raise DataError(f"{file}: is damaged JSON ({whole})")
    if isinstance(whole, list):
        raise DataError(f"{file}: is one JSON list; expected {_EXPECTED}")
    return _all_or_none(_read_jsonl(text, file), file)


def _all_or_none(entries: list[Entry], file: Path) -> list[Entry]:
    without = [entry for entry in entries if entry.split is None]
    if without and len(without) < len(entries):
        raise DataError(f'{file}, {without[0].where}: has no "split", though others have; give it to all or to none')
    return entries


def read_results(file: Path) -> dict[str, str]:
    """Captions by image id, from COCO's results format: `[{"image_id": 42, "caption": "..."}, ...]`.

    Raises DataError, naming the entry, for anything else, such as two captions of an image.
    """
    expected = 'a list of {"image_id": ..., "caption": "..."}, COCO\'s results format'
    whole = _parse_json(_read_text(file, expected))
    if isinstance(whole, Exception):
        raise DataError(f"{file}: is not JSON ({whole}); expected {expected}")
    if not isinstance(whole, list) or not whole:
        raise DataError(f"{file}: must be {expected}, not {_shown(whole)}")
    results: dict[str, str] = {}
    places: dict[str, str] = {}
    for where, value in _objects({"results": whole}, "results", ("image_id", "caption"), file):
        key = _id(value["image_id"], f"{where}.image_id", file)
        if key in results:
            raise DataError(f"{file}, {where}: is a second caption of image {_shown(key)}, as {places[key]}; keep one")
        results[key], places[key] = _text(value["caption"], f"{where}.caption", file), where
    return results


def _parse_json(text: str) -> Any:
    """The value, or the error where `text` is not JSON: only the caller knows which line of the file it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return error


def _lines(text: str) -> Iterable[tuple[str, str]]:
    """("line 3", its text) for every line that is not blank."""
    return ((f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _text(value: object, where: str, file: Path) -> str:
    if not isinstance(value, str):
        raise DataError(f"{file}, {where}: must be a string, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{file}, {where}: holds half of a surrogate pair, which is no character") from None
    return value.strip()


def _shown(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _captions(values: object, where: str, file: Path) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise DataError(f"{file}, {where}: must be a list of strings, not {_shown(values)}")
    captions = (_text(value, f"{where}[{i}]", file) for i, value in enumerate(values))
    return tuple(caption for caption in captions if _says_something(caption))


def _says_something(caption: str) -> bool:
    """Whether there is a letter or a digit: data sets hold captions such as "." too."""
    return any(character.isalnum() for character in caption)


def _split(value: object, where: str, file: Path) -> str | None:
    if value is None:
        return None
    return split_name(_text(value, where, file)) or None


def _id(value: object, where: str, file: Path) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError(f"{file}, {where}: must be a whole number or a name, not {_shown(value)}")
    text = str(value) if isinstance(value, int) else _text(value, where, file)
    if not text:
        raise DataError(f"{file}, {where}: is empty; it must be a number or a name")
    return text


def _photo(value: object, where: str, file: Path) -> str:
    """The name of a photo; "./a.jpg" and "a.jpg" are one."""
    path = PurePosixPath(_text(value, where, file))
    if path.name in {"", ".."}:
        raise DataError(f"{file}, {where}: must name a photo, not {_shown(value)}")
    return str(path)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read_token_file(text: str, file: Path) -> list[Entry]:
    entries = []
    for where, line in _lines(text):
        match = _TOKEN_LINE.fullmatch(line)
        if match is None:
            raise DataError(f"{file}, {where}: is not of the form photo.jpg#0 TAB caption: {_shown(line)}")
        image, caption = _photo(match["image"], where, file), match["caption"].strip()
        captions = (caption,) if _says_something(caption) else ()
        entries.append(Entry((image,), captions, _stem(image), None, where))
    known = {entry.names[0] for entry in entries} | {entry.id for entry in entries}
    splits = _read_split_lists(file, known)
    return [replace(entry, split=splits.get(entry.names[0], splits.get(entry.id))) for entry in entries]


def _read_split_lists(token_file: Path, known: set[str]) -> dict[str, str]:
    """Photo -> split, from the lists beside a token file: one name a line, the split's name in the file's name."""
    lists: dict[str, Path] = {}
    splits: dict[str, str] = {}
    for path in sorted(token_file.parent.glob("*.txt")):
        split = _named_split(path.name)
        if split is None or path == token_file or not path.is_file():
            continue
        names = [line.strip() for _, line in _lines(_read_text(path))]
        if known.isdisjoint(names):
            continue  # some other text
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"{path}: {len(unknown)} of its {len(names)} photos have no caption in {token_file.name} "
                f"(the first: {_shown(unknown[0])}); remove them from the list"
            )
        if split in lists:
            raise DataError(f"{path.parent}: {lists[split].name} and {path.name} both list {split} photos; keep one")
        lists[split] = path
        for name in names:
            if splits.setdefault(name, split) != split:
                raise DataError(f"{path}: lists {name}, as {lists[splits[name]].name} does; a photo has one split")
    return splits


def _read_karpathy(document: dict[str, Any], file: Path) -> list[Entry]:
    images = document["images"]
    if not isinstance(images, list) or not images:
        raise DataError(f"{file}, images: must be a list of photos, not {_shown(images)}")
    return [_read_karpathy_image(image, f"images[{i}]", file) for i, image in enumerate(images)]


def _read_karpathy_image(image: object, where: str, file: Path) -> Entry:
    if not isinstance(image, dict):
        raise DataError(f"{file}, {where}: must be an object, not {_shown(image)}")
    for field in ("filename", "sentences"):
        if field not in image:
            raise DataError(f"{file}, {where}: has no {field!r}")
    name = _photo(image["filename"], f"{where}.filename", file)
    folder = _text(image.get("filepath", ""), f"{where}.filepath", file)
    sentences = image["sentences"]
    if not isinstance(sentences, list) or not all(isinstance(s, dict) and "raw" in s for s in sentences):
        raise DataError(f"{file}, {where}.sentences: must be a list of objects with 'raw', the caption")
    key = next((field for field in ("cocoid", "imgid") if field in image), None)
    return Entry(
        names=(str(PurePosixPath(folder, name)), name) if folder else (name,),
        captions=_captions([s["raw"] for s in sentences], f"{where}.sentences", file),
        id=_id(image[key], f"{where}.{key}", file) if key else _stem(name),
        split=_split(image.get("split"), f"{where}.split", file),
        where=where,
    )


def _has_file_name(images: list[Any]) -> bool:
    return any(isinstance(image, dict) and "file_name" in image for image in images)


def _read_coco(document: dict[str, Any], file: Path) -> list[Entry]:
    """COCO's annotation format, which NoCaps has, too, with a domain for each image; a test split has no annotations.

    The file's name says which split it is. Reference files without file names are read, too: to score, none are needed.
    """
    split = _named_split(file.stem)
    entries: dict[str, Entry] = {}
    captions: dict[str, list[str]] = {}
    for where, image in _objects(document, "images", ("id",), file):
        key = _id(image["id"], f"{where}.id", file)
        name = _photo(image.get("file_name", key), f"{where}.file_name", file)
        if key in entries:
            raise DataError(f"{file}, {where}: has the id {key} of {entries[key].where}; ids must differ")
        domain = _domain(image.get("domain"), f"{where}.domain", file)
        entries[key], captions[key] = Entry((name,), (), key, split, where, domain), []
    if not entries:
        raise DataError(f"{file}, images: is an empty list; expected {_EXPECTED}")
    for where, annotation in _objects(document, "annotations", ("image_id", "caption"), file):
        key = _id(annotation["image_id"], f"{where}.image_id", file)
        if key not in captions:
            raise DataError(f"{file}, {where}.image_id: {_shown(key)} is not the id of any of its images")
        captions[key] += _captions([annotation["caption"]], f"{where}.caption", file)
    names: dict[str, Entry] = {}
    for entry in entries.values():
        if (owner := names.setdefault(entry.names[0], entry)) is not entry:
            raise DataError(f"{file}, {entry.where}: has the photo of {owner.where}, {entry.names[0]}, and another id")
    return [replace(entry, captions=tuple(captions[key])) for key, entry in entries.items()]


def _objects(
    document: dict[str, Any], field: str, keys: Sequence[str], file: Path
) -> Iterable[tuple[str, dict[str, Any]]]:
    """("images[3]", its value) of a list of objects that have certain keys."""
    values = document.get(field, [])
    if not isinstance(values, list):
        raise DataError(f"{file}, {field}: must be a list, not {_shown(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{file}, {field}[{i}]: must be an object, not {_shown(value)}")
        if absent := [key for key in keys if key not in value]:
            what = " (these are no captions: instances or keypoints?)" if absent == ["caption"] else ""
            raise DataError(f"{file}, {field}[{i}]: has no {absent[0]!r}{what}")
        yield f"{field}[{i}]", value


def _domain(value: object, where: str, file: Path) -> str | None:
    """Of NoCaps: in-domain, near-domain or out-domain; other names serve as well."""
    return None if value is None else _text(value, where, file) or None


def _read_jsonl(text: str, file: Path) -> list[Entry]:
    entries = []
    for where, line in _lines(text):
        value = _parse_json(line)
        if isinstance(value, Exception):
            reason = f"{value.msg}, column {value.colno}" if isinstance(value, json.JSONDecodeError) else str(value)
            raise DataError(f"{file}, {where}: is not JSON ({reason})")
        if not isinstance(value, dict) or "image" not in value or "captions" not in value:
            raise DataError(f'{file}, {where}: must be {{"image": ..., "captions": [...]}}, not {_shown(line)}')
        name = _photo(value["image"], f"{where}, image", file)
        captions = value["captions"]
        entries.append(
            Entry(
                names=(name,),
                captions=_captions([captions] if isinstance(captions, str) else captions, f"{where}, captions", file),
                id=_id(value["id"], f"{where}, id", file) if "id" in value else _stem(name),
                split=_split(value.get("split"), f"{where}, split", file),
                where=where,
                domain=_domain(value.get("domain"), f"{where}, domain", file),
            )
        )
    return entries


def _merge(entries: Iterable[Entry], file: Path) -> list[Entry]:
    """One entry for each photo, with the captions of all its lines."""
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
    owners: dict[str, Entry] = {}
    for entry in merged.values():
        if (owner := owners.setdefault(entry.id, entry)) is not entry:
            raise DataError(
                f"{file}, {entry.where}: {entry.names[0]} has the id {entry.id!r} of {owner.names[0]} ({owner.where}); "
                "ids must differ"
            )
    return [replace(entry, captions=tuple(captions[name])) for name, entry in merged.items()]
