"""Offline tools for policies: recordings, tests, explanations, replay, diff."""
