"""Sources of text, and how calibration and evaluation turn text into token windows."""
