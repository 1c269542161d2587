"""The command lines. Each module imports only what its command needs, so that --help and itune-run start fast."""
