"""Decode ahead: worker threads read and shrink the next images while the model is at work on these.

Threads are enough, since Pillow lets go of the interpreter's lock while it decodes and resizes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")
D = TypeVar("D")


class _Done(NamedTuple, Generic[D]):
    """A future that is over."""

    value: D

    def cancel(self) -> bool:
        return False

    def result(self) -> D:
        return self.value


_Decoding: TypeAlias = "Future[D] | _Done[D]"
_Pair: TypeAlias = "tuple[list[T], _Decoding[D]]"


def decode_ahead(
    images: Iterable[T], decode: Callable[[T], D], *, batch_size: int, workers: int
) -> Generator[list[tuple[T, D]], None, None]:
    """Yield `images` in batches and in order, each image with what `decode` makes of it.

    `images` is iterated by the caller's thread. `workers` threads decode encoded files (paths and bytes), and while
    the caller has a batch they are at work on the next one: at most 2 * batch_size images are taken and not yet
    given back. The caller's thread decodes, too, where it would wait. Without workers, at most batch_size images
    are taken. Arrays and Pillow images are decoded as they are taken, so that one buffer may serve for all of them.

    What `images` raises is raised after the batches of what it gave before.
    """
    pool: ThreadPoolExecutor | None = None
    failure: Exception | None = None

    # Images travel in boxes, lists of one, that are emptied at the end: a busy pool's queue holds on to what was
    # cancelled.
    def open_and_decode(box: list[T]) -> D:
        return decode(box[0])

    def start(box: list[T], first: bool) -> _Decoding[D]:
        nonlocal pool
        # The first image is decoded here: where it stays the only one, no thread is ever started.
        if first or not workers or not isinstance(box[0], str | Path | bytes):
            return _Done(open_and_decode(box))
        if pool is None:
            from concurrent.futures import ThreadPoolExecutor  # 4 ms, which a single image does without

            pool = ThreadPoolExecutor(workers, thread_name_prefix="itune-decode")
        return pool.submit(open_and_decode, box)

    def started() -> Iterator[_Pair[T, D]]:
        nonlocal failure
        try:
            for number, image in enumerate(images):
                box = [image]
                yield box, start(box, first=number == 0)
        except Exception as error:
            failure = error

    upcoming = started()

    def take() -> list[_Pair[T, D]]:
        return list(islice(upcoming, batch_size))

    def finish(batch: list[_Pair[T, D]]) -> list[tuple[T, D]]:
        # From the back, as the workers come from the front: all are busy until they meet.
        for place, (box, decoding) in reversed(list(enumerate(batch))):
            if decoding.cancel():
                batch[place] = box, _Done(open_and_decode(box))
        decoded = [decoding.result() for _, decoding in batch]
        return [(box.pop(), each) for (box, _), each in zip(batch, decoded, strict=True)]

    try:
        following = take()
        while following:
            batch, following = following, take() if workers else []
            yield finish(batch)
            del batch  # first let go of its images
            following = following or take()
        if failure is not None:
            raise failure
    finally:
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
