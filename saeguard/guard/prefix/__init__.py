"""What was read of tokens in the prefix cache."""
