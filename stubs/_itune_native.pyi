from collections.abc import Sequence

from itune.runtime.engines.base import Float32, Int64

class Search:
    """The search's core in C++: `core.Core` says what its methods do, `SearchConfig` what its options mean."""

    def __init__(
        self,
        prompts: Int64,
        *,
        end_token: int,
        most_candidates: int,
        num_beams: int,
        max_new_tokens: int,
        min_new_tokens: int,
        length_penalty: float,
        stop_when_full: bool,
        stop_never_early: bool,
        no_repeat_ngram_size: int,
        repetition_penalty: float,
        bad_words: Sequence[Sequence[int]],
        do_sample: bool,
        rows_per_image: int,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
    ) -> None: ...
    @property
    def k(self) -> int: ...
    def advance(
        self, logits: Float32, token_ids: Int64, logsumexp: Float32, /
    ) -> tuple[Int64, Int64, Int64 | None]: ...
    def captions(self) -> list[list[tuple[list[int], float]]]: ...

def top_k(logits: Float32, k: int) -> tuple[Float32, Int64, Float32]: ...
