"""What a compression will take, from shapes alone: its own code runs on tensors that hold no values."""
