"""Evaluators: perplexity, accuracy, throughput; and the size of the compressed model."""
