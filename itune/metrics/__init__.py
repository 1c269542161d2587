"""Caption scores as papers report them: the arithmetic of the COCO caption evaluation code.

There is a module per metric, and all see the same words (`split_words`). Scores keep that code's scale: CIDEr-D 1.167
where a paper prints 116.7.
"""

from __future__ import annotations

from .cider import CiderD
from .evaluation import SCORES, Evaluation, compare_groups, evaluate
from .statistics import Difference
from .tokenize import split_words

__all__ = ["SCORES", "CiderD", "Difference", "Evaluation", "compare_groups", "evaluate", "split_words"]
