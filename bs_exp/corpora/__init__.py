"""Sources of text, and the token windows that calibration and evaluation cut from them."""
