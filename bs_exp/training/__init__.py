"""One trainer for factors and adapters, its optimiser, its objectives and its data."""
