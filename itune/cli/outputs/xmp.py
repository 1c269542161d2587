"""XMP sidecars: read and set `dc:description`, and keep everything else (ISO 16684-1, XMP specification parts 1 and 3).

Python's own parser reads no external entity. A document type is refused before it is read, so there are no entities of
the file's own either, and nothing expands.
"""

from __future__ import annotations

import re
from contextlib import suppress
from xml.etree import ElementTree

_X, _RDF, _DC, _XML = (
    f"{{{name}}}"
    for name in (
        "adobe:ns:meta/",
        "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "http://purl.org/dc/elements/1.1/",
        "http://www.w3.org/XML/1998/namespace",
    )
)
_DEFAULT = "x-default"
"""The language of the text that a program shows unless it is asked for another."""
_EMPTY = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/"/>
 </rdf:RDF>
</x:xmpmeta>"""
# Exiv2 recognises a sidecar by this packet, or by the literal text "<x:xmpmeta", within its first 80 bytes.
_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
_TAIL = '\n<?xpacket end="w"?>\n'
_NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Builder(ElementTree.TreeBuilder):
    """Refuses a document type, keeps comments and instructions, and has the prefixes written as they were."""

    def __init__(self) -> None:
        super().__init__(insert_comments=True, insert_pis=True)

    def doctype(self, *_: object) -> None:
        raise ValueError("has a document type, which XMP never has")

    def start_ns(self, prefix: str, uri: str) -> None:
        with suppress(ValueError):  # ns0, ns1 and so on are numbered anew
            if prefix:
                ElementTree.register_namespace(prefix, uri)


class Sidecar:
    """The content of an XMP sidecar."""

    def __init__(self, content: bytes = _EMPTY) -> None:
        """Parse a sidecar; raise ValueError or ElementTree.ParseError if it is none."""
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_Builder()))
        rdf = root if root.tag == f"{_RDF}RDF" else root.find(f"{_RDF}RDF")
        if rdf is None:
            raise ValueError("is not XMP: it has no rdf:RDF")
        self._root, self._rdf = root, rdf

    @property
    def description(self) -> str:
        """The text of `dc:description` in any language; empty if there is none."""
        texts = [text for element in self._rdf.iterfind(f"*/{_DC}description") for text in element.itertext()]
        texts += [element.get(f"{_DC}description", "") for element in self._rdf]
        return " ".join(" ".join(texts).split())

    def describe(self, text: str) -> None:
        """Set the default language of `dc:description`; other languages stay."""
        owners = self._rdf.findall("*") or [
            ElementTree.SubElement(self._rdf, f"{_RDF}Description", {f"{_RDF}about": ""})
        ]
        for each in owners:
            each.attrib.pop(f"{_DC}description", None)  # the short form, which has no language
        found = (each.find(f"{_DC}description") for each in owners)
        description = next((each for each in found if each is not None), None)
        if description is None:
            description = ElementTree.SubElement(owners[0], f"{_DC}description")
        languages = description.find(f"{_RDF}Alt")
        if languages is None:
            tail = description.tail
            description.clear()
            description.tail = tail
            languages = ElementTree.SubElement(description, f"{_RDF}Alt")
        for each in languages.findall(f"{_RDF}li"):
            if each.get(f"{_XML}lang", "").lower() == _DEFAULT:
                languages.remove(each)
        default = ElementTree.Element(f"{_RDF}li", {f"{_XML}lang": _DEFAULT})
        default.text = _NOT_XML.sub("\ufffd", text)
        languages.insert(0, default)  # the default comes first

    def to_bytes(self) -> bytes:
        """The sidecar as UTF-8."""
        for prefix, uri in (("x", _X), ("rdf", _RDF), ("dc", _DC)):
            ElementTree.register_namespace(prefix, uri[1:-1])
        text = ElementTree.tostring(self._root, encoding="unicode").rstrip()
        # Only values that were escaped still have a carriage return; as it is, it would be read as a line feed.
        return f"{_HEAD}{text}{_TAIL}".replace("\r", "&#13;").encode()
