"""What runs in vLLM's engine core process."""
