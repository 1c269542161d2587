"""The recipe for a language model trained with prompts, on a tiny one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from itune.backbones import load_language_model
from itune.retrieval.build import build_datastore
from itune.retrieval.options import CaptionSource
from tests.conftest import CAPTIONS, REPOSITORY, random_photo


@pytest.mark.slow
def test_it_learns_to_read_prompts(tmp_path: Path, language_model_folder: Path, clip_folder: Path) -> None:
    (tmp_path / "language-model").symlink_to(language_model_folder)
    (tmp_path / "vision").symlink_to(clip_folder)
    for split, numbers in (("train", range(12)), ("dev", range(12, 16))):
        lines = []
        for i in numbers:
            random_photo(i).save(tmp_path / f"{i}.png")
            lines.append(json.dumps({"image": f"{i}.png", "captions": [CAPTIONS[i % 6], CAPTIONS[(i + 1) % 6]]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    build_datastore(CaptionSource(captions=tmp_path / "train.jsonl"), str(clip_folder), tmp_path / "datastore")

    def run(epochs: int) -> str:
        command = [sys.executable, "-m", "recipes.prompted_language_model", "--work-dir", tmp_path]
        command += ["--epochs", str(epochs), "--warmup", "1"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run(3)
    assert "after epoch 0" in said
    perplexities = [float(each) for each in re.findall(r"'4':\s+([\d.]+)", said)]
    assert len(perplexities) == 5  # at first, after each epoch, on the int8 grid
    assert perplexities[3] < 0.99 * perplexities[0]
    result = json.loads((tmp_path / "prompted" / "result.json").read_text())
    assert set(result["dev_perplexity_int8"]) == {"4", "0", "bare"}
    model = load_language_model(str(tmp_path / "prompted" / "language-model")).model
    assert model.config.n_positions == model.transformer.wpe.num_embeddings == 128
    said = run(4)  # goes on
    assert "after epoch 3" in said
    assert "epoch 4: loss" in said
