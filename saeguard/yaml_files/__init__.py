"""Files that people write: read strictly, with line and column of every mistake."""
