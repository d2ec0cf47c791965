"""The core, which knows no engine: watch list, tap, clamps, rules, ledger, verdicts."""
