"""Self-critical sequence training: raise the CIDEr-D of captions that the model itself draws.

Rennie et al., "Self-critical Sequence Training for Image Captioning" (CVPR 2017, arXiv:1612.00563), equations 4 to 8:
for captions w drawn from the model p, with the reward r(w),

    gradient of -E[r(w)] = -E[(r(w) - b) * gradient of log p(w)],    log p(w) = sum over tokens t of log p(w_t | w_<t)

for any baseline b that does not depend on w. As in Luo, "A Better Variant of Self-Critical Sequence Training"
(arXiv:2003.09971), b is the mean reward of the photo's other samples. A step of B photos with K samples each minimises

    -1/(B K) * sum over photos i and samples k of (r_ik - b_ik) * log p(w_ik),   b_ik = mean of r_ij over j != k

where w_ik ends with the end token, unless it is cut at max_new_tokens. The reward is in `rewards.py`.

Captions are drawn in evaluation mode, and the gradient is taken in evaluation mode as well. So the p of both is the
same, and the gradient's expectation is exactly the one above (in fp32: the gradient pass may run in bf16). Dropout
and label smoothing do not apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from ...backbones import VisionTower
from ...data.records import Record
from ...eager import EagerEngine
from ...methods.base import CaptionModel
from ...runtime.engines.base import Candidates, Int64
from ...runtime.search import SearchConfig
from ...runtime.search.loop import search
from ...runtime.search.numpy_search import NumpySearch
from ...runtime.search.sampling import Float64
from ...runtime.settings import MOST_BEAMS
from ..batches import Batch, make_batch, pack_batch
from ..config import TrainConfig
from .base import Objective
from .rewards import Rewarder, Rewards


@dataclass(frozen=True)
class _Drawn:
    """Drawn captions of some photos, with their rewards [images, K] as soon as they are known."""

    batch: Batch  # K captions of each photo
    visual: Tensor
    rewards: Callable[[], Rewards]


class SelfCritical(Objective):
    """The policy gradient of the captions' CIDEr-D against the photo's training captions."""

    shown: ClassVar[tuple[str, ...]] = ("reward", "advantage_std")

    def __init__(
        self,
        config: TrainConfig,
        model: CaptionModel,
        tower: VisionTower,
        tokenizer: Tokenizer,
        end: int,
        train: Sequence[Record],
    ) -> None:
        """`end`: the end token; `train`: the photos with the captions to reward."""
        super().__init__(config, model)
        self.tower, self.tokenizer, self.end = tower, tokenizer, end
        references: dict[Path, list[str]] = {}
        for record in train:
            references.setdefault(record.image, []).extend(record.captions)
        self.rewarder = Rewarder(references)

    def backward(self, step: int, batches: Sequence[Batch], visuals: Iterable[Tensor]) -> dict[str, float]:
        """Add the gradients of the step (see `Objective`).

        Metrics: `reward`, the mean of all samples, which is also the mean of their baselines; `advantage_std`, the
        standard deviation of reward - baseline; `reward_seconds`, for how much of `step_seconds` the step waited for
        rewards.
        """
        started, waited = time.monotonic(), 0.0
        self.model.train(False)
        samples = self.config.scst_samples * sum(len(batch.records) for batch in batches)
        metrics, found = {"loss": 0.0}, list[Tensor]()
        for drawn in _one_ahead(map(self._draw, batches, visuals)):
            if not found:
                metrics |= self.entropy(step, drawn.batch, drawn.visual)
            asked = time.monotonic()
            rewards = torch.tensor(drawn.rewards(), dtype=torch.float32)
            waited += time.monotonic() - asked
            advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
            loss = self._loss(drawn, advantages) / samples
            loss.backward()  # type: ignore[no-untyped-call]
            metrics["loss"] += float(loss.detach())
            found.append(torch.stack([rewards, advantages]))
        rewards, advantages = torch.cat(found, 1)
        return metrics | {
            "reward": float(rewards.mean()),
            "advantage_std": float(advantages.std()),
            "reward_seconds": waited,
            "step_seconds": time.monotonic() - started,
        }

    def _loss(self, drawn: _Drawn, advantages: Tensor) -> Tensor:
        """Sum of -advantage * log p(caption) over captions with `advantages` [images, K]."""
        batch = drawn.batch
        # Targets are ordered by image, then by caption, in packed rows as well.
        lengths = torch.tensor([len(caption) for record in batch.records for caption in record.captions])
        weights = advantages.flatten().repeat_interleave(lengths).to(self.device)
        with self.autocast():
            logits = self.model.scored_logits(batch.input_ids, batch.mask, drawn.visual, batch.packing)
        return weights @ F.cross_entropy(logits, batch.input_ids[batch.mask], reduction="none")

    def _draw(self, batch: Batch, visual: Tensor) -> _Drawn:
        """Draw captions of a batch's photos, and have their rewards computed."""
        samples, most = self.config.scst_samples, self.config.max_new_tokens
        options = SearchConfig(num_beams=1, do_sample=True, num_return=samples, top_k=samples, max_new_tokens=most)
        engine = _DrawingEngine(self.model, self.tower)
        prompts = [record.prompt for record in batch.records]
        found = search(engine, engine.encode_features(visual), prompts, options, self.end, core=_DrawingSearch)
        tokens = [[caption.tokens for caption in captions] for captions in found]
        texts = [[self.tokenizer.decode(list(each), skip_special_tokens=True) for each in photo] for photo in tokens]
        # What reached the maximum has no end token.
        ends = [[len(each) < most for each in photo] for photo in tokens]
        rewards = self.rewarder.submit(batch.images, texts, ends)
        captions = [
            tuple((*each, self.end) if end else each for each, end in zip(*photo, strict=True))
            for photo in zip(tokens, ends, strict=True)
        ]
        records = [replace(record, captions=own) for record, own in zip(batch.records, captions, strict=True)]
        drawn = (make_batch if batch.packing is None else pack_batch)(records, batch.flip)
        return _Drawn(drawn.to(self.device), visual, rewards)


class _DrawingEngine(EagerEngine):
    """Draws k tokens of each row with the model's probabilities, in the place of the k best.

    `SearchConfig.seed` would draw too. But its random numbers are the same for all photos, so that no caption depends
    on its batch; here they would correlate the noise of a step's gradients. It would also sort the whole vocabulary.
    """

    @property
    def most_candidates(self) -> int:
        """Any number of tokens can be drawn, since they may repeat."""
        return MOST_BEAMS

    def candidates(self, logits: Tensor, k: int) -> Candidates:
        """K tokens of each row of logits [rows, vocabulary], drawn independently."""
        logsumexp = logits.logsumexp(1)
        if not logsumexp.isfinite().all():  # not to be drawn from: the search says so
            return super().candidates(logits, k)
        drawn = torch.multinomial(logits.softmax(1), k, replacement=True)
        return Candidates(logits.gather(1, drawn).cpu().numpy(), drawn.cpu().numpy(), logsumexp.cpu().numpy())


class _DrawingSearch(NumpySearch):
    """Sample j takes the j-th of the tokens that the engine has drawn."""

    def choose(self, logits: Float64, token_ids: Int64, sample: int) -> int:  # noqa: ARG002
        """The index of the drawn token."""
        return sample


def _one_ahead(items: Iterator[_Drawn]) -> Iterator[_Drawn]:
    """The same items, each one once the next is there: rewards are computed while the next photos are captioned."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before
