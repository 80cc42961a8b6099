"""Sketches of clients' data, distances between them, similarity of cores, and mixing weights."""
