"""Benchmarks: measured by hand on the machine of interest, never timed in a test."""
