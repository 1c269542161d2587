"""itune-serve: an HTTP service that captions photos. Imports the server's libraries only once it serves."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from ..runtime.errors import ItuneError, reading
from ..serve.settings import Batching, Limits
from . import common
from .engine import EngineOptions
from .program import Options, Program

_TOKEN_VARIABLE = "ITUNE_SERVE_TOKEN"


class _Server(Options, title="Server"):
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 and :: are all."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    token_file: Path | None = None
    """File with the bearer token that captions and metrics need. Default: ITUNE_SERVE_TOKEN; without it, none."""
    cors_origin: tuple[str, ...] = ()
    """Origin of pages that may use the service from a browser, such as https://example.org; may be repeated."""


def serve(
    bundle: Annotated[
        Path | None,
        Parameter(
            name="BUNDLE",
            help="Folder that itune-export wrote. Default: the model inside the package.",
            allow_leading_hyphen=False,
        ),
    ] = None,
    /,
    *,
    server: _Server,
    model: EngineOptions,
    batching: Batching,
    limits: Limits,
) -> None:
    """Caption photos over HTTP.

    POST one or several photos to /v1/caption; the answer is the JSON of itune-run. / is a page to try it with,
    /openapi.json the description. SIGTERM and Ctrl-C finish what was accepted.

    Examples:
        itune-serve
        itune-serve my-bundle --host 0.0.0.0 --token-file token --workers 2 --threads 4
        curl -F image=@photo.jpg 'localhost:8000/v1/caption?num_beams=3'
    """
    common.require("serve", "starlette", "uvicorn", "python_multipart", "prometheus_client")
    from ..runtime.cpus import available_cpus

    if model.threads is None:
        model = model.model_copy(update={"threads": max(1, available_cpus() // batching.workers)})
    token = _token(server.token_file)
    with reading(f"--host {server.host} --port {server.port}"):
        v6 = ":" in server.host
        listener = socket.create_server(
            (server.host, server.port),
            family=socket.AF_INET6 if v6 else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=v6 and socket.has_dualstack_ipv6(),
        )
    place = f"[{server.host}]" if v6 else server.host
    print(f"itune-serve: listening on http://{place}:{listener.getsockname()[1]}", file=sys.stderr, flush=True)
    from ..serve.server import serve as run

    run(model.loader(bundle), listener, batching, limits, token=token, cors_origins=server.cors_origin)


def _token(file: Path | None) -> str | None:
    """The token of the file or the environment variable; None: the service is open."""
    place, token = (str(file), None) if file else (_TOKEN_VARIABLE, os.environ.pop(_TOKEN_VARIABLE, None))
    if file:
        with reading(file):
            token = file.read_text(encoding="utf-8")
    if token is None:
        return None
    token = token.strip()
    if len(token) < 16 or not token.isascii() or not token.isprintable() or " " in token:
        raise ItuneError(f"{place}: a token is at least 16 printable ASCII characters without spaces")
    return token


PROGRAM = Program("itune-serve", serve)
main = PROGRAM.run

if __name__ == "__main__":
    main()
