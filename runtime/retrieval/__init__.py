"""Retrieve captions of similar images, and write them into prompts."""
