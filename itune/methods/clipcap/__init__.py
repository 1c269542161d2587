"""ClipCap (Mokady et al., https://arxiv.org/abs/2111.09734): the image as a prefix."""
