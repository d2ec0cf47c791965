"""Record and recall the fired latents of tokens in vLLM's prefix cache."""
