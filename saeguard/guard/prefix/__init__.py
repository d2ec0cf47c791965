"""The fired latents of tokens in vLLM's prefix cache."""
