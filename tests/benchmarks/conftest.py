"""One run of the latency benchmark with everybody in it, which its tests share."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from itune.export.bundle import export_bundle
from itune.export.options import ExportOptions
from tests.benchmarks.commands import BATCH_SIZE, BENCHMARKS, NEW_TOKENS, Contest, latency


@pytest.fixture(scope="session")
def artifacts() -> ModuleType:
    """The module, without its folder staying in the path of later imports."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import artifacts
    finally:
        sys.path.remove(str(BENCHMARKS))
    return artifacts


@pytest.fixture(scope="session")
def contest(artifacts: ModuleType, checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Contest:
    """Every peer that can run here and two bundles, of which the run exports one itself."""
    work = tmp_path_factory.mktemp("latency")
    export_bundle(checkpoint_folder, work / "bundle-fp32", ExportOptions(verify=False))
    peers = {name: peer for name, peer in artifacts.PEERS.items() if not {"compiled", "device"} & peer.options.keys()}
    names = [name for name, peer in peers.items() if not peer.lacks("clip")]
    options = ("--work-dir", work, "--repeats", 1, "--warmup", 1, "--threads", 1, "--batch-size", BATCH_SIZE)
    options += ("--new-tokens", NEW_TOKENS, "--contestants", ",".join(names), "--json", work / "out.json")
    done = latency("--checkpoint", checkpoint_folder, *options)
    assert done.returncode == 0, done.stderr
    return Contest(work, json.loads((work / "out.json").read_text()), done.stdout)


@pytest.fixture
def status_of() -> Iterator[Callable[..., int]]:
    """Call a script's `main` in this process: main, arguments -> its exit status."""
    before = signal.getsignal(signal.SIGTERM)

    def call(main: Callable[[list[str]], int], *arguments: object) -> int:
        try:
            return main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            return int(exit_.code or 0)

    yield call
    signal.signal(signal.SIGTERM, before)
