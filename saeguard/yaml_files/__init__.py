"""Files that people write: read strictly, and every mistake told with its line and column."""
