"""Hydra: composes the configuration, builds the experiment, starts sweeps."""
