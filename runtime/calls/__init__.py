"""One call of a compiled transformer: choose a glue, answer its guards, count the work."""
