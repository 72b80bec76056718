"""Statistics of the dense model on the calibration sequences."""
