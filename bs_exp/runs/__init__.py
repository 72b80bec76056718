"""What wraps one run: its record, its environment, what it shares with others, what it prints."""
