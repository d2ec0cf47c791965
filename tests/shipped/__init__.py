"""The shipped set on texts of our own."""
