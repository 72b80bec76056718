"""Local importance: which input channels count more in the metric. One file per strategy."""
