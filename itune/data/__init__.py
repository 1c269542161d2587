"""Photos and their captions, and the visual embeddings of the photos."""
