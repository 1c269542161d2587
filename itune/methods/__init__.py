"""The captioning methods, one folder each: I-Tuning, ClipCap and SmallCap."""
