"""`python -m saeguard`."""

from saeguard.cli import main

main()
