"""Where the captions of itune-run go: each output is a `Writer`, in a file of its own."""
