"""The demo: a guarded server, forty prompts, and what the guard saw."""
