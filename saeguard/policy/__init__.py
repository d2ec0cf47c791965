"""Policy files: read, checked, and turned into what the guard evaluates."""
