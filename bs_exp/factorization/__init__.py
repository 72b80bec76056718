"""The spectra and the factors of groups of matrices, made once and cached."""
