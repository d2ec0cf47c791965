"""Change the watch list of a running server."""
