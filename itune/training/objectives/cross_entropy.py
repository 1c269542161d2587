"""Next-token cross-entropy on the captions, averaged over the tokens of a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..batches import Batch
from .base import Objective


class CrossEntropy(Objective):
    """-log p(caption | photo), with label smoothing; adapters and visual embeddings have their dropout."""

    def backward(self, step: int, batches: Sequence[Batch], visuals: Iterable[Tensor]) -> dict[str, float]:
        """Add the gradients of the step (see `Objective`)."""
        self.model.train(True)
        targets = sum(batch.targets for batch in batches)
        metrics = {"loss": 0.0}
        for i, (batch, embeddings) in enumerate(zip(batches, visuals, strict=True)):
            visual, on_device = self._drop_visual(embeddings), batch.to(self.device)
            if i == 0:
                metrics |= self.entropy(step, on_device, visual)
            with self.autocast():
                loss = self.model.loss(
                    on_device.input_ids, on_device.mask, visual, self.config.label_smoothing, on_device.packing
                )
                loss = loss / targets
            loss.backward()  # type: ignore[no-untyped-call]
            metrics["loss"] += float(loss.detach())
        return metrics

    def _drop_visual(self, visual: Tensor) -> Tensor:
        kept = round(visual.shape[1] * (1 - self.config.visual_dropout))
        if kept == visual.shape[1]:
            return visual
        return visual[:, torch.randperm(visual.shape[1])[: max(1, kept)]]
