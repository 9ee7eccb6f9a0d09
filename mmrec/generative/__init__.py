"""Generative retrieval: semantic IDs of products, a model that generates them, and what recommends."""
