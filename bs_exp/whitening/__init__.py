"""Whitening: in which metric the error of a group is measured. One file per strategy."""
