"""Which role wrote each token of a prompt."""
