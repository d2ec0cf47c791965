"""Clamps inside the forward pass."""
