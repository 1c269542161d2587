"""SmallCap (Ramos et al., https://arxiv.org/abs/2209.15323): cross-attention in every block."""
