"""Whitening: the metric in which the error of a group is measured. One file per strategy."""
