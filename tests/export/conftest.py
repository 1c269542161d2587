"""The verification's two processes, in this one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from itune.export.verify import verification
from itune.runtime.errors import ItuneError


@pytest.fixture(scope="module", autouse=True)
def verification_in_this_process() -> Iterator[None]:
    """Both sides of a verification run here, where torch is loaded: `tests/itune/cli/test_export.py` starts them."""

    def run(_module: str, *arguments: object, about: str, error: type[ItuneError]) -> None:
        try:
            verification.main(*map(str, arguments))
        except ItuneError as reason:
            raise error(f"{about}: {reason}") from None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "run_module", run)
        yield
