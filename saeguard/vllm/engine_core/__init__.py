"""The guard's code in vLLM's engine core processes."""
