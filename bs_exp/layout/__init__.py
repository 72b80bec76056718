"""Layout: how a group's factors are stored, hence what a rank costs. One file per strategy."""
