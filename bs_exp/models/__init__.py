"""Where models come from, and which of their matrices can be compressed."""
