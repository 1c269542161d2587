"""Retrieval of similar captions from a datastore."""
