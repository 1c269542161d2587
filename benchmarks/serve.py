"""How much of `Captioner.stream`'s rate itune-serve keeps, its latency at half load, and what twice its load does.

    python benchmarks/serve.py --images FOLDER --json serve.json

Rounds alternate between `Captioner.stream` in this process and as many clients as two batches that ask the service
again at once. Then requests come at fixed times, whether the service has answered or not: at half of its median rate,
and at twice. The clients run on the same CPUs; what they use is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from throughput import photos

from itune.files import write_json
from itune.runtime import Captioner, ImageError, ItuneError
from itune.runtime.cpus import available_cpus

BATCH = 8


class Client:
    """Connections of HTTP/1.1 that carry one request at a time: less work than a client library's.

    The service closes those that are idle for 5 seconds, so take a new Client after a pause.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def caption(self, photo: bytes) -> tuple[int, float]:
        """The status of the answer and the seconds that it took; status 0 is a broken connection."""
        start = time.perf_counter()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        try:
            head = f"POST /v1/caption HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nContent-Length: {len(photo)}"
            writer.write(f"{head}\r\n\r\n".encode() + photo)
            answer = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].partition(b"\r")[0]))
        except (OSError, asyncio.IncompleteReadError):
            writer.close()
            return 0, time.perf_counter() - start
        if b"connection: close" in answer.lower():
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(answer.split()[1]), time.perf_counter() - start

    async def saturate(self, images: Sequence[bytes], seconds: float, clients: int) -> tuple[int, float]:
        """Photos, and the seconds they took, while each client asks again as soon as it has its answer."""
        source, start, done = cycle(images), time.perf_counter(), 0

        async def ask() -> None:
            nonlocal done
            while time.perf_counter() < start + seconds:
                status, _ = await self.caption(next(source))
                if status != 200:
                    raise ItuneError(f"the service answered with status {status}")
                done += 1

        await asyncio.gather(*(ask() for _ in range(clients)))
        return done, time.perf_counter() - start

    async def arrive(self, images: Sequence[bytes], seconds: float, rate: float) -> list[tuple[int, float]]:
        """Send `rate` requests per second, at fixed times; the answers' status and seconds."""
        start, tasks = time.perf_counter(), []
        for number, photo in enumerate(islice(cycle(images), int(seconds * rate))):
            await asyncio.sleep(max(0, start + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self.caption(photo)))
        return await asyncio.gather(*tasks)


@contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[tuple[int, psutil.Process]]:
    """The service with its defaults, warm; its port and its process."""
    bundle = [str(arguments.bundle)] if arguments.bundle else []
    options = ["--port", "0", "--threads", str(arguments.threads), "--max-batch", str(BATCH)]
    command = [sys.executable, "-m", "itune.cli.serve", *bundle, *options]
    environment = {name: value for name, value in os.environ.items() if name != "ITUNE_SERVE_TOKEN"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    try:
        match = re.search(r"http://[^:]*:(\d+)", process.stderr.readline())
        if match is None:
            raise ItuneError("itune-serve did not start")
        yield int(match[1]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def stream(captioner: Captioner, images: Sequence[bytes], seconds: float) -> tuple[int, float]:
    """Photos through `Captioner.stream`, and the seconds that they took."""
    start, done = time.perf_counter(), 0

    def until_the_end() -> Iterator[bytes]:
        for photo in cycle(images):
            if time.perf_counter() > start + seconds:
                return
            yield photo

    for _, result in captioner.stream(until_the_end(), batch_size=BATCH):
        if isinstance(result, ImageError):
            raise result
        done += 1
    return done, time.perf_counter() - start


def cpu_seconds(service: psutil.Process) -> float:
    """What the service and its workers have used."""
    times = [process.cpu_times() for process in (service, *service.children())]
    return sum(each.user + each.system for each in times)


def memory_mb(service: psutil.Process) -> dict[str, float]:
    """Resident memory of the service and of its workers."""
    workers = sum(child.memory_info().rss for child in service.children())
    return {"service": service.memory_info().rss / 1e6, "workers": workers / 1e6}


def latency(answers: Sequence[tuple[int, float]], status: int) -> dict[str, float]:
    """Percentiles, in milliseconds, of the answers with this status."""
    taken = [1000 * seconds for found, seconds in answers if found == status]
    return (
        dict(zip(("p50", "p99", "max"), map(float, np.percentile(taken, (50, 99, 100))), strict=True)) if taken else {}
    )


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that the JSON file holds."""
    images = [image if isinstance(image, bytes) else Path(image).read_bytes() for image in photos(arguments.images)]
    captioner = Captioner.load(arguments.bundle, threads=arguments.threads)
    rounds: list[dict[str, float]] = []
    with serving(arguments) as (port, service):
        while (await Client(port).caption(images[0]))[0] != 200:
            await asyncio.sleep(0.1)
        captioner.caption(images[0])
        memory = {"start": memory_mb(service)}
        for _ in range(arguments.rounds):
            own, theirs = time.process_time(), cpu_seconds(service)
            streamed, stream_seconds = stream(captioner, images, arguments.seconds)
            between = time.process_time()
            served, serve_seconds = await Client(port).saturate(images, arguments.seconds, 2 * BATCH)
            rounds.append(
                {
                    "streamed_per_s": streamed / stream_seconds,
                    "served_per_s": served / serve_seconds,
                    "ratio": served / serve_seconds / (streamed / stream_seconds),
                    "streamed_cpu_ms": 1000 * (between - own) / streamed,
                    "served_cpu_ms": 1000 * (cpu_seconds(service) - theirs) / served,
                    "client_cpu_ms": 1000 * (time.process_time() - between) / served,
                }
            )
            print({name: round(value, 2) for name, value in rounds[-1].items()}, flush=True)
        rate = statistics.median(each["served_per_s"] for each in rounds)
        half = await Client(port).arrive(images, arguments.seconds, rate / 2)
        memory["after half load"] = memory_mb(service)
        start = time.perf_counter()
        over = await Client(port).arrive(images, arguments.overload_seconds, 2 * rate)
        taken = time.perf_counter() - start  # with the queue that is left at the end
        memory["end"] = memory_mb(service)
    return {
        "threads": arguments.threads,
        "photos": len(images),
        "load_average": os.getloadavg(),
        "rounds": rounds,
        "half_load": {"requests": Counter(status for status, _ in half), "ms": latency(half, 200)},
        "overload": {
            "requests": Counter(status for status, _ in over),
            "captions_per_s": sum(status == 200 for status, _ in over) / taken,
            "ms": latency(over, 200),
            "refusal_ms": latency(over, 503),
        },
        "memory_mb": memory,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bundle", type=Path, help="default: the packaged model")
    parser.add_argument("--images", type=Path, help="folder of photos; default: synthetic JPEGs of 500 x 375")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads of both")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of each turn, and of the half load")
    parser.add_argument("--overload-seconds", type=float, default=30)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    try:
        result = asyncio.run(measure(arguments))
        if arguments.json:
            write_json(arguments.json, result, indent=1)
    except (ItuneError, OSError) as error:
        print(f"serve: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for name in result["rounds"][0]:
        values = [each[name] for each in result["rounds"]]
        print(f"{name}: median {statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})")
    for name in ("half_load", "overload", "memory_mb"):
        print(f"{name}: {result[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
