"""Latents of an SAE on a corpus: an index of it, and searches by prompt, geometry and company."""
