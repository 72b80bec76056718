"""Schedule: in how many rounds the model is brought down to the budget. One file per strategy."""
