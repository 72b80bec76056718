"""What a run can tell besides its compressed model, from what calibration gathered. One file per analysis."""
