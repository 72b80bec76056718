"""The embedded demo: an offline corpus (`python_docs`) and the small trained model that speaks it."""
