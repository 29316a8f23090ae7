"""Wan text-to-video models in JAX/Flax NNX, and how to sample from them."""
