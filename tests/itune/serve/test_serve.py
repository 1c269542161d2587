"""itune-serve as a process, asked over HTTP. A worker that is stopped (SIGSTOP) stands for one that is busy."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openapi_spec_validator import validate
from PIL import Image

from itune import Captioner
from itune.cli import serve as command
from tests.conftest import REPOSITORY
from tests.runtime.fixtures import SENTENCES

TOKEN = "correct-horse-battery"
COLOURS = {"red": "red", "green": "lime", "blue": "blue"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"do_sample": True, "num_return": 2, "temperature": 0.7, "top_p": 0.9, "seed": 5},
    {"num_beams": 1, "max_new_tokens": 6, "bad_words": ["dog", "camera"]},
]


def photo(colour: str, format: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(file, format)
    return file.getvalue()


RED, GREEN, BLUE = map(photo, COLOURS)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    client: httpx.Client
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(32))

    def caption(self, *photos: bytes, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
        """Photos 0.png, 1.png, ... in one request."""
        files = [("image", (f"{number}.png", content)) for number, content in enumerate(photos)]
        return self.client.post("/v1/caption", files=files, params=query, headers=headers)

    def later(self, *photos: bytes, **query: Any) -> Future[httpx.Response]:
        return self.threads.submit(self.caption, *photos, **query)

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        return sum(float(value) for value in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))

    def worker(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        (worker,) = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        return worker

    def wait(self, condition: Callable[[], object], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.02)

    def is_ready(self) -> bool:
        return self.client.get("/readyz").status_code == 200

    @contextmanager
    def busy(self) -> Iterator[psutil.Process]:
        """The worker has a batch of one photo, on which it goes on working after the block."""
        worker = self.worker()
        before = self.metric("itune_batch_photos_count")
        worker.suspend()
        held = self.later(BLUE, num_beams=1)
        self.wait(lambda: self.metric("itune_batch_photos_count") > before)
        try:
            yield worker
        finally:
            if worker.is_running():
                worker.resume()
            held.result()


@contextmanager
def running(*arguments: object, **environment: str) -> Iterator[Server]:
    program = [sys.executable, "-m", "itune.cli.serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    assert process.stderr
    try:
        match = re.search(r"http://\S+", process.stderr.readline())
        assert match
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=match[0], headers=headers, timeout=30) as client:
            server = Server(process, match[0], client)
            server.wait(server.is_ready)
            yield server
            server.threads.shutdown()
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    limits = ("--max-images", 3, "--max-queue", 6, "--max-body-mb", 0.2, "--max-held-mb", 0.3)
    with running(bundle, *limits, "--threads", 1, "--max-batch", 4, "--cors-origin", "https://example.org") as server:
        yield server


@pytest.fixture(scope="module")
def guarded(bundle: Path) -> Iterator[Server]:
    """Impatient, and with a token."""
    times = ("--header-timeout", 0.5, "--body-timeout", 0.5, "--batch-timeout", 1.5, "--max-connections", 8)
    with running(bundle, "--threads", 1, *times, ITUNE_SERVE_TOKEN=TOKEN) as server:
        yield server


def test_captions_are_those_of_the_captioner() -> None:
    paths = sorted((REPOSITORY / "examples").glob("*.jpg"))
    captioner = Captioner.load()
    expected = [captioner.caption(paths, **options) for options in OPTIONS]
    with running("--threads", 2, "--max-wait-ms", 50) as server:
        requests = [[server.later(path.read_bytes(), **options) for path in paths] for options in OPTIONS]
        for captions, answers in zip(expected, requests, strict=True):
            for caption, answer in zip(captions, answers, strict=True):
                found = answer.result().json()
                assert (found["caption"], found["tokens"]) == (caption.caption, list(caption.tokens))
                assert [each["caption"] for each in found["candidates"]] == [c.caption for c in caption.candidates]
                assert found["score"] == pytest.approx(caption.score)
                assert found["engine"] == captioner.engine_name
        assert server.metric("itune_batch_photos_count") < len(OPTIONS) * len(paths)


def test_one_photo(server: Server) -> None:
    answer = server.caption(GREEN)
    assert answer.status_code == 200
    assert answer.json()["image"] == "0.png"
    assert answer.json()["caption"] == SENTENCES["green"]
    for kind in ("image/png", "application/octet-stream"):
        raw = server.client.post("/v1/caption?num_beams=2", content=RED, headers={"Content-Type": kind}).json()
        assert raw["caption"] == SENTENCES["red"]
        assert len(raw["candidates"]) == 2


def test_several_photos_with_options_and_a_bad_one(server: Server) -> None:
    files = [("a", ("red.png", RED)), ("b", ("b.png", b"no photo")), ("options", (None, '{"num_beams": 2}'))]
    first, second = server.client.post("/v1/caption", files=files).json()["results"]
    assert first["caption"] == SENTENCES["red"]
    assert len(first["candidates"]) == 2
    assert second["image"] == "b.png"
    assert second["status"] == 422
    assert "caption" not in second


def test_json_lines_arrive_as_they_finish(server: Server) -> None:
    with server.busy() as worker:
        photos = {"images": ("red.png", RED), "image": ("green.png", GREEN)}
        headers = {"Accept": "application/x-ndjson"}
        with server.client.stream("POST", "/v1/caption", files=photos, headers=headers) as answer:
            assert answer.status_code == 200  # before the worker could do anything
            worker.resume()
            lines = [json.loads(line) for line in answer.iter_lines()]
    assert [line["caption"] for line in lines] == [SENTENCES["red"], SENTENCES["green"]]


def test_requests_share_a_batch_if_their_options_are_equal(server: Server) -> None:
    def batches() -> float:
        return server.metric("itune_batch_photos_count")

    with server.busy():
        before = batches()
        same = [server.later(RED, num_beams=2), server.later(GREEN, num_beams=2), server.later(BLUE, num_beams=2.0)]
        other = server.later(RED, num_beams=3)
        server.wait(lambda: server.metric("itune_queue_photos") == 4)
    assert [each.result().json()["caption"] for each in same] == list(SENTENCES.values())
    assert other.result().json()["caption"] == SENTENCES["red"]
    assert batches() == before + 2


@pytest.mark.parametrize(
    ("query", "part", "named"),
    [
        ("num_baems=3", "", "num_beams"),
        ("num_beams=17", "", "num_beams"),
        ("num_beams=many", "", "num_beams"),
        ("num_beams=2&num_beams=3", "", "num_beams"),
        ("do_sample=true&num_return=17", "", "num_return"),
        ("max_new_tokens=100000", "", "max_new_tokens"),
        ("max_new_tokens=39&min_new_tokens=40", "", "min_new_tokens"),
        ("temperature=0.5", "", "temperature"),
        ("length_penalty=NaN", "", "length_penalty"),
        ("batch_size=2", "", "batch_size"),
        ("", '{"top_p": 2, "do_sample": true}', "top_p"),
        ("", "[1]", "options"),
        ("", "{", "options"),
        ("", '{"bad_words": [' + 200_000 * "[" + "]}", "options"),
    ],
)
def test_wrong_options_are_named(server: Server, query: str, part: str, named: str) -> None:
    files: dict[str, Any] = {"image": ("a.png", RED)} | ({"options": (None, part[:16_000])} if part else {})
    answer = server.client.post(f"/v1/caption?{query}", files=files)
    assert answer.status_code == 422
    assert named in answer.json()["error"]


def test_names_are_labels(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(RED)
    for name in (str(secret), "../../etc/passwd", "https://example.org/a.png", "C:\\a\u202e\x1b[31m.png", "0" * 1000):
        answer = server.client.post("/v1/caption", files={"image": (name, b"")})
        assert answer.status_code == 422
        assert answer.json()["image"]
        assert "caption" not in answer.json()
    answer = server.client.post("/v1/caption", files={"image": (str(secret), GREEN)}).json()
    assert (answer["image"], answer["caption"]) == (str(secret), SENTENCES["green"])


def test_hostile_images(server: Server) -> None:
    bomb = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(bomb, "PNG")
    for content in (
        bomb.getvalue(),
        RED[:40],
        b"GIF89a" + bytes(90),
        b"%!PS-Adobe-3.0 EPSF-3.0",
        photo("red", "JPEG")[:-99],
    ):
        answer = server.caption(content)
        assert answer.status_code == 422, content[:10]
        assert "0.png" in answer.json()["error"]
    assert server.caption(RED).json()["caption"] == SENTENCES["red"]


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (415, "text/plain", RED),
        (415, "", RED),
        (400, "multipart/form-data", RED),
        (400, "multipart/form-data; boundary=x", b"--y\r\n"),
        (422, "multipart/form-data; boundary=x", b"--x--\r\n"),
        (
            422,
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n',
        ),
        (
            400,
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="a.png"\r\n\r\n'
            + RED
            + b"\r\n--x\r\nContent-Dis",
        ),
        (
            400,
            "multipart/form-data; boundary=x; charset=undefined",
            b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nb\r\n--x--\r\n',
        ),
        (422, "image/png", b""),
        (413, "image/png", bytes(200_001)),
    ],
)
def test_bodies_that_are_refused(server: Server, status: int, kind: str, body: bytes) -> None:
    answer = server.client.post("/v1/caption", content=body, headers={"Content-Type": kind})
    assert answer.status_code == status
    assert answer.json()["error"]


def test_limits_of_a_request(server: Server) -> None:
    assert server.caption(RED, RED, RED, RED).status_code == 413
    assert server.caption(*100 * [RED]).status_code == 413
    endless = (bytes(10_000) for _ in range(10_000))  # chunked: no length is declared
    assert server.client.post("/v1/caption", content=endless, headers={"Content-Type": "image/png"}).status_code == 413
    with connect(server) as talker:
        talker.sendall(b"GET / HTTP/1.1\r\nX-Long: " + 70_000 * b"a")
        assert b" 400 " in talker.recv(1000)
    assert server.metric("itune_held_bytes") == 0


def test_a_full_queue_refuses_at_once_and_answers_what_it_accepted(server: Server) -> None:
    with server.busy():
        accepted = [server.later(RED, GREEN, BLUE), server.later(BLUE, RED)]
        server.wait(lambda: server.metric("itune_queue_photos") == 5)
        refused = server.caption(RED, GREEN)
        assert refused.status_code == 503
        assert int(refused.headers["Retry-After"]) > 0
        accepted.append(server.later(GREEN))
        server.wait(lambda: server.metric("itune_queue_photos") == 6)
        start = time.monotonic()
        with connect(server) as waiting:  # refused before the photo is sent
            waiting.sendall(head(1000))
            assert b" 503 " in waiting.recv(1000)
        assert time.monotonic() - start < 5
    assert [answer.result().status_code for answer in accepted] == [200, 200, 200]


def test_all_requests_together_hold_bounded_memory(server: Server) -> None:
    with connect(server) as slow:
        slow.sendall(head(199_000) + bytes(190_000))
        server.wait(lambda: server.metric("itune_held_bytes") == 190_000)
        refused = server.caption(bytes(150_000))
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
    server.wait(lambda: server.metric("itune_held_bytes") == 0)


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    with server.busy():
        for accept in ("*/*", "application/x-ndjson"):
            with connect(server) as client:
                client.sendall(head(len(RED), Accept=accept) + RED)
                server.wait(lambda: server.metric("itune_queue_photos") == 1)
            server.wait(lambda: server.metric("itune_queue_photos") == 0)
    assert server.metric("itune_held_bytes") == 0


def test_clients_that_leave_are_not_logged(bundle: Path) -> None:
    with running(bundle, "--threads", 1) as server:
        with server.busy(), connect(server) as client:
            client.sendall(head(len(RED)) + RED)
            server.wait(lambda: server.metric("itune_queue_photos") == 1)
        assert server.caption(RED).status_code == 200
        server.process.terminate()
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""


def test_a_killed_worker_loses_its_batch_only(server: Server) -> None:
    restarts = server.metric("itune_worker_restarts_total")
    worker = server.worker()
    worker.suspend()
    batches = server.metric("itune_batch_photos_count")
    lost = server.later(RED, GREEN)
    server.wait(lambda: server.metric("itune_batch_photos_count") > batches)
    waiting = [server.later(GREEN), server.later(BLUE, num_beams=2)]
    server.wait(lambda: server.metric("itune_queue_photos") == 2)
    worker.kill()
    assert [each["status"] for each in lost.result().json()["results"]] == [503, 503]
    assert [each.result().json()["caption"] for each in waiting] == [SENTENCES["green"], SENTENCES["blue"]]
    assert server.metric("itune_worker_restarts_total") == restarts + 1


def test_an_idle_worker_is_replaced(server: Server) -> None:
    old = server.worker()
    old.kill()
    server.wait(lambda: not server.is_ready() or server.metric("itune_worker_restarts_total") > 0)
    answer = server.caption(RED)
    assert answer.status_code == 200
    assert server.worker().pid != old.pid


def test_a_bundle_that_is_moved_and_comes_back(bundle: Path, tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    shutil.copytree(bundle, here)
    with running(here, "--threads", 1) as server:
        here.rename(elsewhere)
        with server.busy() as worker:
            waiting = server.later(RED, num_beams=2)
            server.wait(lambda: server.metric("itune_queue_photos") == 1)
            worker.kill()
            assert waiting.result().status_code == 503
            assert not server.is_ready()
        elsewhere.rename(here)
        server.wait(server.is_ready)
        assert server.caption(RED).json()["caption"] == SENTENCES["red"]


def test_the_service_does_not_load_the_engine(server: Server) -> None:
    server.caption(RED)
    for process, loaded in ((server.worker(), True), (psutil.Process(server.process.pid), False)):
        assert any("onnxruntime" in each.path for each in process.memory_maps()) == loaded


def test_the_description_is_openapi(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    validate(document)
    names = [parameter["name"] for parameter in document["paths"]["/v1/caption"]["post"]["parameters"]]
    assert {"num_beams", "temperature", "bad_words"} <= set(names)


def test_the_page_loads_nothing_from_elsewhere(server: Server) -> None:
    page = server.client.get("/")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    files = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(files) == 2
    for name in files:
        assert server.client.get(f"/{name}").status_code == 200
    assert server.client.get("/page.py").status_code == 404
    assert server.client.get("/..%2fapp.py").status_code == 404
    assert server.client.get("/v1/caption").status_code == 405


def test_other_origins(server: Server) -> None:
    def allowed(origin: str) -> str | None:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        return server.client.options("/v1/caption", headers=asks).headers.get("Access-Control-Allow-Origin")

    assert allowed("https://example.org") == "https://example.org"
    assert allowed("https://example.com") is None


@pytest.mark.parametrize("value", ["", TOKEN, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}\xe9"])
def test_a_token_is_needed(guarded: Server, value: str) -> None:
    assert guarded.caption(RED).status_code == 200
    for method, path in (("POST", "/v1/caption"), ("GET", "/metrics")):
        answer = guarded.client.request(method, path, headers={"Authorization": value.encode("latin-1")})
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
    for path in ("/healthz", "/readyz", "/openapi.json", "/"):
        assert httpx.get(guarded.url + path).status_code == 200
    assert "security" in guarded.client.get("/openapi.json").json()["paths"]["/metrics"]["get"]


@pytest.mark.parametrize("content", ["tooshort", "a token with spaces", "é" * 20], ids=("few", "gap", "other"))
def test_token_files(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "t"
    file.write_text(content, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["itune-serve", "--port", "0", "--token-file", str(file)])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    printed = capsys.readouterr().err
    assert str(file) in printed
    assert content not in printed


def test_slow_clients_are_let_go(guarded: Server) -> None:
    with connect(guarded) as silent, connect(guarded) as headers, connect(guarded) as body:
        headers.sendall(b"POST /v1/caption HTTP/1.1\r\nHost:")
        body.sendall(head(1000) + b"x")
        assert b" 408 " in body.recv(1000)
        for each in (silent, headers):
            assert each.recv(1000) == b""


def test_connections_are_bounded(guarded: Server) -> None:
    sockets = [connect(guarded) for _ in range(8)]
    with pytest.raises(httpx.HTTPStatusError, match="503"):
        httpx.get(f"{guarded.url}/healthz").raise_for_status()
    for each in sockets:
        each.close()
    guarded.wait(guarded.is_ready)


def test_a_batch_that_takes_too_long(guarded: Server) -> None:
    guarded.worker().suspend()
    answer = guarded.caption(RED)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert guarded.caption(RED).json()["caption"] == SENTENCES["red"]


def test_sigterm_finishes_what_was_accepted(bundle: Path) -> None:
    with running(bundle, "--threads", 1) as server:
        with server.busy():
            accepted = [server.later(RED), server.later(GREEN, num_beams=2)]
            server.wait(lambda: server.metric("itune_queue_photos") == 2)
            for process in psutil.Process(server.process.pid).children():
                process.send_signal(signal.SIGTERM)  # as systemd and container engines may do
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: refuses_connections(server))
        assert [each.result().json()["caption"] for each in accepted] == [SENTENCES["red"], SENTENCES["green"]]
        assert server.process.wait(20) == 0


def test_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "itune.cli.serve", str(tmp_path / "none"), "--port", "0"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr


def connect(server: Server) -> socket.socket:
    return socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0), timeout=20)


def head(length: int, **headers: str) -> bytes:
    """The headers of a photo of this many bytes."""
    given = {"Host": "a", "Content-Type": "image/png", "Content-Length": str(length), **headers}
    given["Authorization"] = f"Bearer {TOKEN}"
    return "\r\n".join(["POST /v1/caption HTTP/1.1", *(f"{k}: {v}" for k, v in given.items()), "", ""]).encode()


def refuses_connections(server: Server) -> bool:
    try:
        connect(server).close()
    except ConnectionRefusedError:
        return True
    return False
