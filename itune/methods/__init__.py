"""The captioning methods, one module each: I-Tuning, ClipCap and SmallCap."""
