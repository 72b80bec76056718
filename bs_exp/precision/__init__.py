"""In how many bits the compressed matrices are stored."""
