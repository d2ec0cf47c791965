"""Triton kernels of the tap."""
