"""The COCO code's own tokenizer: Stanford's PTBTokenizer, as pycocoevalcap starts it, one line for each caption."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from itune.metrics.java import find_java, find_program

Captions = dict[str, list[str]]
PUNCTUATION = {"''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"}


def ptb_lines(lines: Sequence[str]) -> list[list[str]]:
    """The words of each line, less the COCO code's punctuation. Raises UnavailableError without Java or the package."""
    jar = find_program("tokenizer", "stanford-corenlp-3.4.1.jar")
    command: list[str | Path] = [find_java().path, "-Dfile.encoding=UTF-8", "-cp", jar]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    text = "\n".join(line.replace("\n", " ") for line in lines)
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    printed = done.stdout.decode().split("\n")[: len(lines)]
    assert len(printed) == len(lines)
    return [[word for word in line.rstrip().split(" ") if word not in PUNCTUATION and word] for line in printed]


def coco_tokenize(captions: Mapping[str, Sequence[str]]) -> Captions:
    """The words of each caption, joined by spaces."""
    words = iter(ptb_lines([line for lines in captions.values() for line in lines]))
    return {key: [" ".join(next(words)) for _ in lines] for key, lines in captions.items()}
