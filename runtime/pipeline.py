"""Decode ahead: worker threads decode the next images while the model runs on the current ones.

Threads are enough, since Pillow releases the interpreter's lock while it decodes and resizes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")
D = TypeVar("D")


def decode_ahead(
    images: Iterable[T], decode: Callable[[T], D], *, batch_size: int, workers: int
) -> Generator[list[tuple[T, D]], None, None]:
    """Yield `images` in batches and in order, each image with the result of `decode`.

    The caller's thread iterates `images`. While the caller handles a batch, `workers` threads decode the files (paths
    and bytes) of the next one, so at most 2 * batch_size images are taken and not yet yielded; without workers, at most
    batch_size. The caller's thread decodes, too, instead of waiting. Arrays and Pillow images are decoded when they are
    taken, so that the caller may reuse one buffer for all of them.

    An exception of `images` is raised after the batches of the images before it.
    """
    pool: ThreadPoolExecutor | None = None
    failure: Exception | None = None

    # An image travels in a box, a list of one, that is emptied at the end: a busy pool's queue keeps references to
    # cancelled calls.
    def open_and_decode(box: list[T]) -> D:
        return decode(box[0])

    def start(box: list[T], first: bool) -> Callable[[], D]:
        """Begin to decode; what this returns waits for the result."""
        nonlocal pool
        # The first image is decoded here: a single image starts no thread.
        if first or not workers or not isinstance(box[0], str | Path | bytes):
            decoded = open_and_decode(box)
            return lambda: decoded
        if pool is None:
            from concurrent.futures import ThreadPoolExecutor  # takes 4 ms, which a single image saves

            pool = ThreadPoolExecutor(workers, thread_name_prefix="itune-decode")
        future = pool.submit(open_and_decode, box)
        return lambda: open_and_decode(box) if future.cancel() else future.result()

    def started() -> Iterator[tuple[list[T], Callable[[], D]]]:
        nonlocal failure
        try:
            for number, image in enumerate(images):
                box = [image]
                yield box, start(box, first=number == 0)
        except Exception as error:
            failure = error

    upcoming = started()

    def take() -> list[tuple[list[T], Callable[[], D]]]:
        return list(islice(upcoming, batch_size))

    def finish(batch: list[tuple[list[T], Callable[[], D]]]) -> list[tuple[T, D]]:
        # From the back, as the workers come from the front: all are busy until they meet.
        decoded = [wait() for _, wait in reversed(batch)]
        return [(box.pop(), each) for (box, _), each in zip(batch, reversed(decoded), strict=True)]

    try:
        following = take()
        while following:
            batch, following = following, take() if workers else []
            yield finish(batch)
            del batch  # release its images before the next batch is taken
            following = following or take()
        if failure is not None:
            raise failure
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
