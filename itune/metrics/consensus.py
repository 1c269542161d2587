"""Which of a photo's captions says what the others say: by CIDEr-D among themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .cider import CiderD


def most_typical_first(captions: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every image's captions, those first that score highest against the image's others (Devlin et al. 2015).

    Document frequencies come from all of `captions`; those of a single image have none, and stay as they are.
    """
    if len(captions) < 2:
        return {image: tuple(texts) for image, texts in captions.items()}
    cider = CiderD(captions)
    return {image: tuple(texts[i] for i in cider.typical_order(image)) for image, texts in captions.items()}
