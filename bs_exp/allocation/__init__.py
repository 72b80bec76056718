"""Allocation: the rank of every group under the budget. One file per strategy; `budget.py` is shared by all of them."""
