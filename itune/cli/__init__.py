"""The command lines. Each module imports only what its command needs: --help and itune-run start fast."""
