"""Pallas kernels for TPU and GPU, each with an XLA form that runs everywhere; imports jax only."""

__all__: list[str] = []
