"""Selection: which of several recipes is used. One file per strategy."""
