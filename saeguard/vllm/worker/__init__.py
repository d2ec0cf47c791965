"""The guard's code in vLLM's worker processes."""
