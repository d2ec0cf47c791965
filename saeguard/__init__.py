"""Watch SAE latents inside vLLM while it serves."""

__version__ = "0.1.0"
