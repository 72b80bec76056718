"""The embedded demo: an offline corpus (`python_docs`) and a small model trained on it."""
