"""The engine-neutral core: watch list, tap, clamp, rules, ledger, verdicts."""
