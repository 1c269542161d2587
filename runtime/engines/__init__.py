"""Engines run a bundle's graphs behind the protocol in `base`."""
