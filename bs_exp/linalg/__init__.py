"""The mathematics: whiten, decompose, truncate, pivot, refit. Tensors in, tensors out; no model, no disk."""
