"""Policies that change while they are in use: noticed, compiled aside, swapped between steps."""
