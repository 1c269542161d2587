"""SPICE, by its authors' Java program inside `pycocoevalcap`, whose models have to be there already.

Anderson, Fernando, Johnson, Gould, "SPICE: Semantic Propositional Image Caption Evaluation" (ECCV 2016).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .java import UnavailableError, find_java, find_program, run_jar
from .meteor import Pair
from .statistics import Metric, mean_metric

MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
NEWEST_JAVA = 15
"""From 16 on, Java keeps the program's serialisation library out of its own classes."""


def spice(pairs: Sequence[Pair]) -> Metric:
    """SPICE of (candidate words, the words of each of its references) pairs.

    Raises UnavailableError where Java, the program or its models are missing, Java is too new, or the program fails.
    """
    jar = find_program("spice", "spice-1.0.jar")
    java = find_java()
    reasons = []
    if absent := [name for name in MODELS if not (jar.parent / "lib" / name).is_file()]:
        reasons.append(
            f"its models are not there: put {' and '.join(absent)} of Stanford CoreNLP 3.6.0 (2015-12-09) "
            f"into {jar.parent / 'lib'}"
        )
    if java.version > NEWEST_JAVA:
        reasons.append(
            f"{java.path} is Java {java.version}, too new for it: set JAVA_HOME to a Java from 8 to {NEWEST_JAVA}"
        )
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
        try:
            found = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(target.read_bytes())}
            metric = mean_metric("spice", [float(found[i]) for i in range(len(images))])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{jar.name} on {java.path} wrote no scores ({error!r})") from None
    if not np.isfinite(metric.statistics).all():
        raise UnavailableError(f"{jar.name} on {java.path} wrote scores that are no numbers")
    return metric
