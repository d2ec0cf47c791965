"""Policies on labelled texts: one report, with floors and baselines beside the policies."""
