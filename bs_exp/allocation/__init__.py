"""Allocation: who gets the ranks. One file per strategy; `budget.py` counts parameters for all of them."""
