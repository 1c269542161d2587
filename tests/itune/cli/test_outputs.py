"""The outputs of itune-run: what they write and keep, also when a run is killed or the disk is full."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pyarrow import parquet

from itune.cli.outputs.base import Captioned
from itune.cli.outputs.lines import Csv, JsonLines
from itune.cli.outputs.sidecars import TextSidecars, XmpSidecars
from itune.cli.outputs.xmp import Sidecar
from itune.data.records import load_records
from itune.files import NoSpaceError
from itune.runtime.caption import Candidate, Caption, Timings
from itune.runtime.errors import ImageError, ItuneError
from tests.conftest import refused
from tests.itune.cli.conftest import BLUE, RED, Paint, Result, process

Run = Callable[..., Result]
EXISTING = b"""<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:darktable="http://darktable.sf.net/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmp:Rating="4" darktable:note="two&#10;lines">
   <!-- kept -->
   <darktable:history><rdf:Seq><rdf:li darktable:operation="blur"/></rdf:Seq></darktable:history>
   <darktable:text>a&#13;&#10;b</darktable:text>
   <dc:subject><rdf:Bag><rdf:li>holiday</rdf:li></rdf:Bag></dc:subject>
  </rdf:Description>
  <rdf:Description rdf:about="" xmlns:mine="urn:mine/"><mine:field>1 &lt; 2</mine:field></rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
"""
TITLE = b"""<dc:description><rdf:Alt><rdf:li xml:lang="x-default">My dog</rdf:li>
<rdf:li xml:lang="de">Mein Hund</rdf:li></rdf:Alt></dc:description>"""
DESCRIBED = EXISTING.replace(b"   <dc:subject>", TITLE + b"   <dc:subject>")
LAUGHS = b"""<!DOCTYPE x [<!ENTITY a "ha">%s]><x:xmpmeta xmlns:x="adobe:ns:meta/">&z;</x:xmpmeta>""" % b"".join(
    b'<!ENTITY %c "%s">' % (ord("b") + i, (b"&%c;" % (ord("a") + i)) * 10) for i in range(25)
)
EXTERNAL = (
    b"""<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]><x:xmpmeta xmlns:x="adobe:ns:meta/">&e;</x:xmpmeta>"""
)
HOSTILE = {
    "billion laughs": LAUGHS,
    "external entity": EXTERNAL,
    "external document type": b'<!DOCTYPE x SYSTEM "http://localhost:9/x.dtd"><x/>',
    "half": EXISTING[: len(EXISTING) // 2],
    "not XMP": b"<html/>",
    "empty": b"",
    "deep": b"<x:xmpmeta xmlns:x='adobe:ns:meta/' xmlns:r='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><r:RDF>"
    + b"<r:Description>" * 100_000
    + b"</r:Description>" * 100_000
    + b"</r:RDF></x:xmpmeta>",
}


def captioned(image: str, caption: str = RED) -> Captioned:
    result = Caption(caption, -0.5, (1,), (Candidate(caption, -0.5),), Timings(0, 0, 0))
    return Captioned(image, result, "native", None)


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines(keepends=True), strict=True))


# Lines


def test_csv(run: Run, paint: Paint, tmp_path: Path) -> None:
    red = paint("red", 'a "b",\nc.png')
    result = run("--csv", red, "missing \udce9.jpg")
    assert (result.status, result.err) == (1, "")
    header, good, bad = rows(result.out)
    assert header == ["image", "caption", "score", "error"]
    assert good[:2] + good[3:] == [str(red), RED, ""]
    assert float(good[2]) < 0
    assert bad[:3] == ["missing \\udce9.jpg", "", ""]
    assert "missing" in bad[3]
    assert result.out.replace("\r\n", "").count("\r") == 0
    assert result.out.count("\r\n") == 3


@pytest.mark.parametrize("format", [Csv(), JsonLines()])
@pytest.mark.parametrize("name", ["a.jpg", 'a "b",\nc\r\n.jpg', "\x1b[2J\t.jpg", " ", "-", "\udce9.jpg", "é\u2028.jpg"])
def test_records_keep_names_and_captions(format: Csv | JsonLines, name: str, tmp_path: Path) -> None:
    content = format.record(captioned(name, 'two\nlines, and "quotes"\x00'))
    content += format.record(Captioned("b", ImageError(f"{name}: no"), "native", None))
    (tmp_path / "file").write_bytes(content.encode())
    with (tmp_path / "file").open("rb") as file:
        found = [format.image(record.decode()) for record in format.records(file)]
    assert found == [format.key(name), "b"]


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_resume_repairs_a_cut_record(run: Run, paint: Paint, tmp_path: Path, option: str) -> None:
    """Whatever the byte at which the earlier run was killed, the file ends up as if it had not been."""
    paths = [paint("red", f'{i}"\n,.png') for i in range(3)]
    output = tmp_path / "out"

    def named() -> list[object]:
        text = output.read_bytes().decode()
        return (
            [row[:2] for row in rows(text)]
            if option == "--csv"
            else [json.loads(x)["image"] for x in text.splitlines()]
        )

    assert run(option, "-o", output, *paths).out == ""
    whole, expected = output.read_bytes(), named()
    for cut in range(0, len(whole), 1 + len(whole) // 12):
        output.write_bytes(whole[:cut])
        assert run(option, "-o", output, "--resume", *paths).status == 0
        assert named() == expected, cut
    assert run(option, "-o", output, "--resume", *paths, model=tmp_path / "none").status == 0  # nothing is left to do


@pytest.mark.parametrize(
    ("option", "content"),
    [
        ("--json", b"precious text without a line break"),
        ("--csv", b'image,caption,score,error\r\nx".jpg,edited by hand,,\r\n1.jpg,one,-1,\r\n2.jpg,two,-1,\r\n'),
        ("--csv", b"image,caption,score,error\n1.jpg,one,-1,\n"),
    ],
)
def test_an_end_that_is_no_cut_record_is_kept(
    run: Run, paint: Paint, tmp_path: Path, option: str, content: bytes
) -> None:
    output = tmp_path / "out"
    output.write_bytes(content)
    result = run(option, "-o", output, "--resume", paint("red"))
    assert (result.status, output.read_bytes()) == (2, content)
    assert str(output) in result.err


def test_an_empty_list_makes_an_empty_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "list").touch()
    (tmp_path / "out.csv").write_text("yesterday's")
    assert run("--csv", "-o", tmp_path / "out.csv", "--overwrite", "--from-file", tmp_path / "list").status == 0
    assert (tmp_path / "out.csv").read_bytes() == b"image,caption,score,error\r\n"


def test_a_photo_that_changes_gets_a_new_sidecar_and_no_other_photo_takes_it(tmp_path: Path) -> None:
    sidecars = TextSidecars(resume=True, overwrite=False)
    jpg, png = str(tmp_path / "a.jpg"), str(tmp_path / "a.png")
    for caption in ("a dog", "a cat"):
        assert not sidecars.has(jpg)
        sidecars.write(captioned(jpg, caption))
    assert not sidecars.has(png)
    with pytest.raises(ItuneError, match=re.escape(png)):
        sidecars.write(captioned(png, "a bird"))
    assert (tmp_path / "a.txt").read_text() == "a cat\n"


def test_a_linked_sidecar_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.jpg.xmp").symlink_to(tmp_path / "real.xmp")
    XmpSidecars(resume=False, overwrite=False).write(captioned(str(tmp_path / "a.jpg"), "a dog"))
    assert (tmp_path / "a.jpg.xmp").is_symlink()
    assert Sidecar((tmp_path / "real.xmp").read_bytes()).description == "a dog"


@pytest.mark.parametrize("content", [b"text of mine\n", b'{"other": 1}\n', b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_files_of_others_are_neither_continued_nor_replaced(
    run: Run, paint: Paint, tmp_path: Path, option: str, content: bytes
) -> None:
    output = tmp_path / "out"
    output.write_bytes(content)
    for more in ([], ["--resume"]):
        result = run(option, "-o", output, *more, paint("red"))
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert str(output) in result.err
        assert output.read_bytes() == content
    assert run(option, "-o", output, "--overwrite", paint("red")).status == 0
    assert RED in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--json", "--csv"], ["--json", "--csv"]),
        (["-o", "x"], ["--output", "--json"]),
        (["--resume"], ["--resume", "--output"]),
        (["--overwrite"], ["--overwrite", "--output"]),
        (["--resume", "--overwrite", "--sidecar", "txt"], ["--resume", "--overwrite"]),
        (["--resume", "--sidecar", "txt", "--parquet", "x"], ["--resume", "--parquet"]),
        (["--sidecar", "xml"], ["--sidecar", "xml"]),
        (["--json", "-o", "none/x"], ["--output none/x"]),
        (["--json", "-o", "a.png", "--overwrite"], ["--output a.png", "photo"]),
        (["--json", "-o", "x", "--parquet", "x"], ["--parquet x", "--output"]),
        (["--json", "-o", "x", "--heatmap-json", "x"], ["--heatmap-json x", "--output"]),
        (["--json", "-o", "x", "--resume", "--heatmap", "h.png"], ["--resume", "--heatmap"]),
        (["-", "--sidecar", "txt"], ["--sidecar", "-"]),
        (["a.jpg", "--sidecar", "txt"], ["a.txt", "a.png", "a.jpg"]),
        (["a.png.xmp", "--sidecar", "xmp"], ["a.png.xmp", "photo"]),
    ],
)
def test_options_that_do_not_fit(
    run: Run, paint: Paint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], named: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    content = paint("red", "a.png").read_bytes()
    result = run("a.png", *arguments)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert all(part in result.err for part in named)
    assert [path.name for path in tmp_path.iterdir() if path.name != "bundle"] == ["a.png"]
    assert Path("a.png").read_bytes() == content


def test_csv_on_a_terminal_shows_no_control_characters(bundle: Path, paint: Paint) -> None:
    ours, theirs = pty.openpty()
    running = process(bundle, "--csv", paint("red", "a\x1b[2J.png"), stdout=theirs)
    assert running.communicate(timeout=60)[1] == b""
    os.close(theirs)
    shown = os.read(ours, 10_000)
    os.close(ours)
    assert b"\x1b" not in shown
    assert b"a\\x1b[2J.png" in shown


# Parquet


def test_parquet(run: Run, paint: Paint, tmp_path: Path) -> None:
    target = tmp_path / "out.parquet"
    red = paint("red", "a\nb.png")
    assert run("--parquet", target, red, "missing \udce9.jpg", "--num-beams", 2).status == 1
    good, bad = parquet.read_table(target).to_pylist()
    assert list(good) == ["image", "caption", "score", "error", "candidates"]
    assert (good["image"], good["caption"], good["error"]) == (str(red), RED, None)
    assert good["candidates"][0] == {"caption": RED, "score": good["score"]}
    assert len(good["candidates"]) == 2
    assert (bad["image"], bad["caption"], bad["candidates"]) == ("missing \\udce9.jpg", None, None)
    assert "missing" in bad["error"]


def test_parquet_appears_whole(bundle: Path, paint: Paint, tmp_path: Path) -> None:
    """Ctrl-C keeps what is done, a kill leaves nothing, and the next run sweeps that away."""
    target = tmp_path / "out" / "out.parquet"
    target.parent.mkdir()
    for number in (signal.SIGKILL, signal.SIGINT):
        running = process(bundle, "--parquet", target, *[paint("red")] * 5000)
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(number)
        running.communicate()
        assert target.exists() == (number == signal.SIGINT)
    assert [path.name for path in target.parent.iterdir()] == ["out.parquet"]
    assert 0 < parquet.read_table(target).num_rows < 5000


# Sidecars


def test_text_sidecars(run: Run, paint: Paint, tmp_path: Path) -> None:
    red, blue = paint("red", "in/red.v2.png"), paint("blue", "in/blue.png")
    before = red.read_bytes()
    result = run("--sidecar", "txt", tmp_path / "in")
    assert result.out == f"{blue}\t{BLUE}\n{red}\t{RED}\n"
    assert (tmp_path / "in" / "red.v2.txt").read_text() == f"{RED}\n"
    assert red.read_bytes() == before
    mine = tmp_path / "in" / "blue.txt"
    mine.write_text("my own words\n")
    refusal = run("--sidecar", "txt", tmp_path / "in")
    assert (refusal.status, refusal.out) == (2, "")
    assert all(part in refusal.err for part in (str(mine), "--overwrite", "--resume"))
    paint("red", "in/new.png")
    assert run("--sidecar", "txt", "--resume", tmp_path / "in").out == f"{tmp_path}/in/new.png\t{RED}\n"
    assert mine.read_text() == "my own words\n"
    assert run("--sidecar", "txt", "--overwrite", tmp_path / "in").status == 0
    assert mine.read_text() == f"{BLUE}\n"
    assert {path.suffix for path in (tmp_path / "in").iterdir()} == {".png", ".txt"}
    assert [record.captions for record in load_records(tmp_path / "in")][:2] == [(BLUE,), (RED,)]


def test_a_caption_is_one_line_of_text(tmp_path: Path) -> None:
    writer = TextSidecars(resume=False, overwrite=False)
    writer.write(captioned(str(tmp_path / "a.jpg"), "two\r\nlines\x1b[2J é"))
    assert (tmp_path / "a.txt").read_text() == "two lines\\x1b[2J é\n"
    with refused(ItuneError, tmp_path / "b.txt"):  # appeared since the check
        (tmp_path / "b.txt").write_text("mine")
        writer.write(captioned(str(tmp_path / "b.png")))


def test_names_that_are_not_utf8(run: Run, paint: Paint, tmp_path: Path) -> None:
    photo = paint("red", "d\udce9j\udce0.png")
    assert run("--sidecar", "txt", "--sidecar", "xmp", "--csv", "-o", tmp_path / "out.csv", photo).status == 0
    assert {b"d\xe9j\xe0.txt", b"d\xe9j\xe0.png.xmp"} < {os.fsencode(path.name) for path in tmp_path.iterdir()}
    assert "d\\udce9j\\udce0.png" in (tmp_path / "out.csv").read_text(encoding="utf-8")
    assert run("--csv", "-o", tmp_path / "out.csv", "--resume", photo, model=tmp_path / "none").status == 0


def test_xmp_keeps_what_is_there(run: Run, paint: Paint, tmp_path: Path) -> None:
    photo = paint("red")
    sidecar = Path(f"{photo}.xmp")
    sidecar.write_bytes(EXISTING)
    before = photo.read_bytes()
    assert run("--sidecar", "xmp", photo).status == 0
    assert photo.read_bytes() == before
    new = sidecar.read_bytes()
    assert Sidecar(new).description == RED
    assert prefixes(new) >= prefixes(EXISTING)
    described = fields(new)
    assert described.pop("description") == [(None, ""), (None, ""), ("x-default", RED)]
    assert described == fields(EXISTING)
    assert b"<!-- kept -->" in new


def prefixes(content: bytes) -> set[tuple[str, str]]:
    parser = ElementTree.XMLPullParser(["start-ns"])
    parser.feed(content)
    return {found for _, found in parser.read_events()}  # type: ignore[misc]


def fields(content: bytes) -> dict[str, list[tuple[str | None, str]]]:
    """Every element of an XMP file below rdf:Description, with its language and its text, and every attribute."""
    found: dict[str, list[tuple[str | None, str]]] = {}
    for owner in ElementTree.fromstring(content).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description"):
        for name, value in owner.attrib.items():
            found.setdefault(f"@{name}", []).append((None, value))
        for top in owner:
            for each in top.iter():
                language = each.get("{http://www.w3.org/XML/1998/namespace}lang")
                entry = language, (each.text or "").strip(" \n")
                found.setdefault(top.tag.partition("}")[2], []).append(entry)
                found.setdefault(f"@{top.tag}", []).extend((None, value) for value in each.attrib.values())
    found.pop("@{http://purl.org/dc/elements/1.1/}description", None)
    return found


def test_descriptions_of_others_are_replaced_only_when_asked(run: Run, paint: Paint) -> None:
    photo = paint("red")
    sidecar = Path(f"{photo}.xmp")
    sidecar.write_bytes(DESCRIBED)
    refusal = run("--sidecar", "xmp", photo)
    assert refusal.status == 2
    assert str(sidecar) in refusal.err
    assert run("--sidecar", "xmp", "--resume", photo).out == ""
    assert sidecar.read_bytes() == DESCRIBED
    assert run("--sidecar", "xmp", "--overwrite", photo).status == 0
    assert fields(sidecar.read_bytes())["description"] == [
        (None, ""),
        (None, ""),
        ("x-default", RED),
        ("de", "Mein Hund"),
    ]


@pytest.mark.parametrize(
    "short",
    [
        EXISTING.replace(b'xmp:Rating="4"', b'dc:description="My dog"'),
        EXISTING.replace(b"<dc:subject>", b"<dc:description>My dog</dc:description><dc:subject>"),
    ],
)
def test_descriptions_without_a_language(short: bytes) -> None:
    sidecar = Sidecar(short)
    assert sidecar.description == "My dog"
    sidecar.describe("A cat")
    assert Sidecar(sidecar.to_bytes()).description == "A cat"
    assert Sidecar(short.decode().replace("UTF-8", "UTF-16").encode("utf-16")).description == "My dog"


@pytest.mark.parametrize("change", [(b"x-default", b"X-Default"), (b"rdf:Description", b"mine:Photo")])
def test_one_description_is_left(change: tuple[bytes, bytes]) -> None:
    content = DESCRIBED.replace(b"<x:xmpmeta", b'<x:xmpmeta xmlns:mine="urn:mine/"').replace(*change)
    sidecar = Sidecar(content)
    sidecar.describe("A cat")
    assert Sidecar(sidecar.to_bytes()).description == "A cat Mein Hund"


@pytest.mark.parametrize("caption", ["<b> & ]]>", "\x00\x1b[2J\ufffe\udce9", "two\r\nlines", "é 日本 🐕"])
def test_xmp_takes_any_caption(caption: str, tmp_path: Path) -> None:
    writer = XmpSidecars(resume=False, overwrite=False)
    writer.write(captioned(str(tmp_path / "a.jpg"), caption))
    text = Sidecar((tmp_path / "a.jpg.xmp").read_bytes()).description
    assert len(text.split()) == len(caption.split())
    assert [c for c in text if c not in caption.replace("\r\n", " ")] == ["\ufffd"] * sum(
        c in "\x00\x1b\ufffe\udce9" for c in caption
    )


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_sidecars_are_one_error(run: Run, paint: Paint, tmp_path: Path, content: bytes) -> None:
    red, blue = paint("red"), paint("blue")
    sidecar = Path(f"{red}.xmp")
    sidecar.write_bytes(content)
    output = tmp_path / "out.csv"
    start = time.process_time()
    result = run("--sidecar", "xmp", red, blue, "--csv", "-o", output)
    assert time.process_time() - start < 30
    assert (result.status, result.err.count("\n")) == (1, 1)
    assert str(sidecar) in result.err
    assert sidecar.read_bytes() == content
    assert Path(f"{blue}.xmp").exists()
    assert [row[1] for row in rows(output.read_text())] == ["caption", RED, BLUE]


def test_a_sidecar_that_blocks_or_is_huge(tmp_path: Path) -> None:
    writer = XmpSidecars(resume=True, overwrite=False)
    os.mkfifo(tmp_path / "a.jpg.xmp")
    (tmp_path / "b.jpg.xmp").mkdir()
    with (tmp_path / "c.jpg.xmp").open("wb") as file:
        file.truncate(1 << 30)  # sparse
    for name in "abc":
        assert not writer.has(str(tmp_path / f"{name}.jpg"))
        with refused(ItuneError, tmp_path / f"{name}.jpg.xmp"):
            writer.write(captioned(str(tmp_path / f"{name}.jpg")))


def test_exiv2_reads_the_sidecars(tmp_path: Path) -> None:
    """The library in which digiKam and darktable read XMP."""
    exiv2 = pytest.importorskip("exiv2")
    (tmp_path / "old.jpg.xmp").write_bytes(EXISTING)
    for name in ("old", "new"):
        XmpSidecars(resume=False, overwrite=False).write(captioned(str(tmp_path / f"{name}.jpg"), "A <dog> é"))
        image = exiv2.ImageFactory.open(str(tmp_path / f"{name}.jpg.xmp"))
        image.readMetadata()
        values = {each.key(): each.print() for each in image.xmpData()}
        assert values["Xmp.dc.description"] == 'lang="x-default" A <dog> é'
        assert name == "new" or (values["Xmp.xmp.Rating"], values["Xmp.mine.field"]) == ("4", "1 < 2")


# Interruptions


@pytest.fixture
def many(paint: Paint) -> Path:
    paths = [paint("red", f"many/{i:03}.png") for i in range(400)]
    return paths[0].parent


@pytest.mark.parametrize("option", ["--json", "--csv"])
def test_kill_and_resume(bundle: Path, many: Path, tmp_path: Path, option: str) -> None:
    """After kill -9, at any moment, --resume repeats and loses nothing: neither records nor sidecars."""
    output = tmp_path / "out"
    given = [option, "-o", output, "--sidecar", "txt", "--sidecar", "xmp", "--resume", many]
    kills = 0
    for records in (3, 40, 150):
        running = process(bundle, *given)
        while running.poll() is None and (output.read_bytes().count(b"\n") if output.exists() else 0) < records:
            time.sleep(0.002)
        running.kill()
        assert running.communicate()[1] == b""
        kills += running.returncode == -signal.SIGKILL
    assert kills == 3
    last = process(bundle, *given)
    assert last.communicate()[1] == b""
    assert last.returncode == 0
    text = output.read_text()
    found = (
        [row[0] for row in rows(text)[1:]] if option == "--csv" else [json.loads(x)["image"] for x in text.splitlines()]
    )
    assert found == [str(path) for path in sorted(many.glob("*.png"))]
    assert {path.read_text() for path in many.glob("*.txt")} == {f"{RED}\n"}
    assert {Sidecar(path.read_bytes()).description for path in many.glob("*.xmp")} == {RED}
    assert sorted(path.suffix for path in many.iterdir()) == [".png"] * 400 + [".txt"] * 400 + [".xmp"] * 400


@pytest.fixture
def full() -> Callable[..., dict[str, object]]:
    """Options of `process` under which no file grows beyond a size, as on a full disk."""

    def limited(size: int) -> dict[str, object]:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return {"preexec_fn": limit}

    return limited


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--csv", "-o", "out"], "out"),
        (["--json", "-o", "out"], "out"),
        (["--parquet", "out"], "out"),
        (["--sidecar", "xmp"], "000.png.xmp"),
    ],
)
def test_a_full_disk_is_one_error(
    bundle: Path, many: Path, tmp_path: Path, full: Callable[..., dict[str, object]], options: list[str], name: str
) -> None:
    running = process(bundle, "--batch-size", 1, *options, many, cwd=tmp_path, **full(300))
    _, err = running.communicate()
    assert running.returncode == 2
    assert err.decode().count("\n") == 1
    assert f"{name}: " in err.decode()
    assert "Traceback" not in err.decode()
    if options[0] in ("--csv", "--json"):  # make room, and go on
        kept = (tmp_path / "out").read_bytes()
        assert len(kept) == 300
        last = process(bundle, *options, "--resume", many, cwd=tmp_path)
        assert last.communicate()[1] == b""
        assert (tmp_path / "out").read_bytes().startswith(kept)
        assert (tmp_path / "out").read_bytes().count(b"\n") == 400 + (options[0] == "--csv")
    else:
        assert not [*tmp_path.rglob("*tmp"), *many.glob("*.xmp"), *tmp_path.glob("out")]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_full_file_system(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount")
    try:
        writer = TextSidecars(resume=False, overwrite=False)
        (folder / "a.txt").write_text("mine")
        (folder / "large").write_bytes(bytes(60 << 10))
        with refused(NoSpaceError, folder / "b.txt"):
            writer.write(captioned(str(folder / "b.jpg"), "a " * 20_000))
        assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "large"]
    finally:
        subprocess.run(["umount", folder], check=True)
