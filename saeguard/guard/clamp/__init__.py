"""Clamps: rules that the device evaluates, and the edit of the residual."""
