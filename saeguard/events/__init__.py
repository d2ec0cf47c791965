"""What the guard reports, and how it gets out without holding up serving."""
