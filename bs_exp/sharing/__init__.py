"""Sharing: which matrices of which layers have a basis in common. One file per strategy."""
