"""Decoding ahead of the model: order, bounds, errors, and threads that end."""

from __future__ import annotations

import os
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions, Precision
from itune.runtime import Caption, Captioner, ImageError, ItuneError
from itune.runtime.image import decode
from itune.runtime.pipeline import decode_ahead

SENTENCES = {"red": "a dog runs on grass", "green": "two children play", "blue": "the sea is calm today"}


@pytest.fixture(scope="module")
def captioner(bundle: Path) -> Captioner:
    return Captioner.load(bundle, threads=1)


def decoders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("itune-decode")]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 20), batch_size=st.integers(1, 6), workers=st.integers(0, 3), seed=st.integers(0, 99))
def test_batches_are_whole_and_in_order(count: int, batch_size: int, workers: int, seed: int) -> None:
    delays = random.Random(seed).choices([0, 0, 0.001], k=count)

    def decode(name: str) -> str:
        time.sleep(delays[int(name)])
        return f"pixels of {name}"

    names = [str(number) for number in range(count)]
    batches = list(decode_ahead(names, decode, batch_size=batch_size, workers=workers))
    assert [pair for batch in batches for pair in batch] == [(name, f"pixels of {name}") for name in names]
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_memory_is_bounded_by_the_images_in_flight(
    captioner: Captioner, paint: Callable[..., Path], workers: int
) -> None:
    content = paint("red").read_bytes()
    alive: list[None] = []  # appending and popping are atomic, counting is not
    most = 0

    class Counted(bytes):
        def __new__(cls, value: bytes) -> Counted:
            nonlocal most
            alive.append(None)
            most = max(most, len(alive))
            return super().__new__(cls, value)

        def __del__(self) -> None:
            alive.pop()

    images = (Counted(content) for _ in range(60))
    taken = 0
    for _, caption in captioner.stream(images, batch_size=4, workers=workers, num_beams=1):
        assert isinstance(caption, Caption)
        taken += 1
    assert taken == 60
    assert most <= (8 if workers else 4) + 1  # the one that was given back last
    assert len(alive) <= 1


@pytest.mark.parametrize(("workers", "ahead"), [(0, 3), (1, 6), (2, 6)])
def test_a_stream_takes_a_bounded_number_of_images_ahead(
    captioner: Captioner, paint: Callable[..., Path], workers: int, ahead: int
) -> None:
    path, taken, threads = paint("red"), 0, set()

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            threads.add(threading.current_thread())
            yield path

    stream = captioner.stream(endless(), batch_size=3, workers=workers, num_beams=1)
    assert taken == 0
    for given_back in range(1, 12):
        next(stream)
        assert given_back <= taken < given_back + ahead
    assert threads == {threading.current_thread()}


def test_workers_decode_while_the_caller_is_busy() -> None:
    decoded: dict[str, str] = {}

    def decode(name: str) -> str:
        decoded[name] = threading.current_thread().name
        return name

    batches = decode_ahead([str(number) for number in range(8)], decode, batch_size=4, workers=1)
    next(batches)
    wait_for(lambda: len(decoded) == 8)  # the second batch, without asking for it
    assert all(decoded[name].startswith("itune-decode") for name in "4567")
    batches.close()


def test_the_caller_decodes_while_it_would_wait() -> None:
    both = threading.Barrier(2, timeout=10)

    def decode(name: str) -> str:
        if name in "12":  # passes only if two threads are here at the same time
            both.wait()
        return threading.current_thread().name

    batches = decode_ahead("012", decode, batch_size=3, workers=1)
    (batch,) = batches
    assert {thread for _, thread in batch[1:]} > {threading.current_thread().name}


def test_a_single_image_starts_no_thread() -> None:
    def decode(name: str) -> threading.Thread:
        return threading.current_thread()

    wait_for(lambda: not decoders())  # other tests'
    assert list(decode_ahead(["photo"], decode, batch_size=1, workers=4)) == [[("photo", threading.current_thread())]]
    assert not decoders()


def test_one_buffer_may_serve_for_every_frame(captioner: Captioner) -> None:
    frame = np.zeros((20, 24, 3), np.uint8)

    def film(make: Callable[[], object]) -> Iterator[object]:
        for channel in (0, 2, 1, 2):
            frame[:] = 0
            frame[:, :, channel] = 255
            yield make()

    expected = [SENTENCES[colour] for colour in ("red", "blue", "green", "blue")]
    for make in (lambda: frame, lambda: Image.frombuffer("RGB", (24, 20), frame, "raw", "RGB", 0, 1)):
        results = captioner.stream(film(make), workers=2)  # type: ignore[type-var]
        assert [result.caption for _, result in results if isinstance(result, Caption)] == expected


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("bad_at", range(8))
def test_an_exception_of_the_iterable_comes_after_the_images_before_it(
    captioner: Captioner, paint: Callable[..., Path], workers: int, bad_at: int
) -> None:
    path = paint("green")

    def images() -> Iterator[Path]:
        yield from [path] * bad_at
        raise LookupError("no more photos")

    captions = []
    with pytest.raises(LookupError, match="no more photos"):  # noqa: PT012
        for _, result in captioner.stream(images(), batch_size=3, workers=workers, num_beams=1):
            captions.append(result)
    assert [each.caption for each in captions if isinstance(each, Caption)] == [SENTENCES["green"]] * bad_at
    wait_for(lambda: not decoders())


def test_an_exception_of_the_decoder_reaches_the_caller() -> None:
    def decode(name: str) -> str:
        if name == "5":
            raise MemoryError(name)
        return name

    for workers in (0, 1, 2):
        with pytest.raises(MemoryError, match="5"):
            list(decode_ahead("0123456789", decode, batch_size=2, workers=workers))
        wait_for(lambda: not decoders())


def test_a_stream_that_is_left_ends_its_threads() -> None:
    decoded = []

    def decode(name: str) -> str:
        time.sleep(0.005)
        decoded.append(name)
        return name

    for leave in ("close", "delete"):
        decoded.clear()
        batches = decode_ahead([str(number) for number in range(1000)], decode, batch_size=50, workers=2)
        next(batches)
        assert decoders()
        if leave == "close":
            batches.close()
        del batches
        wait_for(lambda: not decoders())
        assert len(decoded) < 100, "what was queued is not decoded"


def test_ctrl_c_in_the_iterable_ends_the_threads(captioner: Captioner, paint: Callable[..., Path]) -> None:
    path = paint("red")

    def images() -> Iterator[Path]:
        yield from [path] * 7
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(captioner.stream(images(), batch_size=2, workers=2))
    wait_for(lambda: not decoders())


def test_workers_must_be_a_number_of_threads(captioner: Captioner) -> None:
    with pytest.raises(ItuneError, match="workers must be at least 0, not -1"):
        captioner.stream([], workers=-1)  # at once, not at the first caption


def test_workers_keep_to_the_engines_threads(bundle: Path) -> None:
    assert [Captioner.load(bundle, threads=threads).workers for threads in (1, 2, 3, 64)] == [0, 1, 2, 4]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_threads_share_a_captioner(
    precision: Precision, checkpoint_folder: Path, photos: list[Path], tmp_path: Path
) -> None:
    export_bundle(checkpoint_folder, tmp_path / "bundle", ExportOptions(precision=precision, verify=False))
    captioner = Captioner.load(tmp_path / "bundle", threads=2)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"")
    options: tuple[dict[str, Any], ...] = (
        {"num_beams": 1},
        {"num_beams": 3, "max_new_tokens": 9},
        {"num_beams": 5, "no_repeat_ngram_size": 2},
    )
    alone = [[captioner.caption(photo, **each) for photo in photos] for each in options]
    start = threading.Barrier(6, timeout=30)

    def work(seed: int) -> None:
        start.wait()
        for turn in range(4):
            kind = (seed + turn) % len(options)
            chosen = random.Random(10 * seed + turn).choices([*photos, bad], k=10)
            results = captioner.stream(chosen, batch_size=1 + seed, workers=turn % 3, **options[kind])
            for expected, (photo, result) in zip(chosen, results, strict=True):
                assert photo == expected
                if photo == bad:
                    assert isinstance(result, ImageError)
                else:
                    assert isinstance(result, Caption)
                    single = alone[kind][photos.index(photo)]
                    assert result.tokens == single.tokens
                    assert result.score == pytest.approx(single.score, abs=1e-5)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(work, seed) for seed in range(6)]:
            future.result()


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("itune.runtime.image._LARGE", 100)
    inside: list[None] = []
    most = dict.fromkeys((10, 11), 0)

    class Photo(Image.Image):
        def load(self) -> object:
            inside.append(None)
            time.sleep(0.02)
            most[self.width] = max(most[self.width], len(inside))
            inside.pop()
            return super().load()

    for width in most:  # 10 x 10 is not large yet
        images = [Image.new("RGB", (width, 10)) for _ in range(4)]
        for image in images:
            image.__class__ = Photo
        with ThreadPoolExecutor(4) as pool:
            assert [image.size for image in pool.map(decode, images)] == [(width, 10)] * 4
    assert most[10] > 1
    assert most[11] == 1


def test_decoding_threads_leave_the_warnings_of_others_alone(tmp_path: Path) -> None:
    """`warnings.catch_warnings` in threads that overlap would leave the filters changed for good."""

    def decode_pipe(path: Path) -> None:
        with pytest.raises(ImageError):
            decode(path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads, pipes = [], []
        for name in ("first", "second"):
            os.mkfifo(tmp_path / name)
            threads.append(threading.Thread(target=decode_pipe, args=[tmp_path / name], daemon=True))
            threads[-1].start()
            pipes.append((tmp_path / name).open("wb"))  # waits for its reader
        for thread, pipe in zip(threads, pipes, strict=True):  # the first in is the first out
            with pipe, pytest.raises(UserWarning, match="mine"):
                warnings.warn("mine", stacklevel=1)
            thread.join()
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
