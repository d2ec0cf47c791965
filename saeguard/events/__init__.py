"""Events and metrics: their records, the event log, and the Prometheus counters."""
