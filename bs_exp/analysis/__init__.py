"""Analysis: results of a run besides its compressed model, from its calibration statistics. One file per analysis."""
