"""Measure what a clamp does to what a model writes, against random latents of like strength."""
