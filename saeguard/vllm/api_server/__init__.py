"""The guard's code in vLLM's API server processes."""
