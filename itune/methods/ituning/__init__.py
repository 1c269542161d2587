"""I-Tuning (Luo et al., https://arxiv.org/abs/2202.06574): adapters beside the feed-forward blocks."""
