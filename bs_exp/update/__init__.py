"""Update: what happens to the factors after truncation. One file per strategy."""
