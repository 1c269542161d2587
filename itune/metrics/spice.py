"""SPICE, by its authors' Java program in `pycocoevalcap`; its models must be installed already.

Anderson, Fernando, Johnson, Gould, "SPICE: Semantic Propositional Image Caption Evaluation" (ECCV 2016).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, FiniteFloat, TypeAdapter

from ..runtime.errors import reading
from .java import UnavailableError, find_java, find_program, run_jar
from .statistics import Metric, mean_metric
from .tokenize import Pair

MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
NEWEST_JAVA = 15
"""Java 16 and later deny the program's serialisation library access to the JDK's own classes."""


class _FScore(BaseModel):
    f: FiniteFloat


class _Entry(BaseModel):
    image_id: int
    scores: dict[str, _FScore]


_ENTRIES = TypeAdapter(list[_Entry])


def spice(pairs: Sequence[Pair]) -> Metric:
    """Score captions by SPICE.

    Raises UnavailableError if Java, the program or its models are missing, Java is too new, or the program fails.
    """
    jar = find_program("spice", "spice-1.0.jar")
    java = find_java()
    reasons = []
    if absent := [name for name in MODELS if not (jar.parent / "lib" / name).is_file()]:
        reasons.append(f"put {' and '.join(absent)} of Stanford CoreNLP 3.6.0 (2015-12-09) into {jar.parent / 'lib'}")
    if java.version > NEWEST_JAVA:
        reasons.append(f"{java.path} is Java {java.version}: set JAVA_HOME to a Java from 8 to {NEWEST_JAVA}")
    if reasons:
        raise UnavailableError("; ".join(reasons))
    images = [
        {"image_id": i, "test": " ".join(candidate), "refs": [" ".join(reference) for reference in references]}
        for i, (candidate, references) in enumerate(pairs)
    ]
    with tempfile.TemporaryDirectory(prefix="itune-spice-") as folder:
        source, target = Path(folder, "captions.json"), Path(folder, "scores.json")
        source.write_text(json.dumps(images), encoding="utf-8")
        run_jar(java, jar, [str(source), "-out", str(target), "-subset", "-silent"], memory="8G")
        with reading(f"the scores of {jar.name} on {java.path}", UnavailableError):
            found = {entry.image_id: entry.scores["All"].f for entry in _ENTRIES.validate_json(target.read_bytes())}
            return mean_metric("spice", [found[i] for i in range(len(pairs))])
