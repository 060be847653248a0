"""From a model to a compiled transformer: at once, at the first call, or as a dry run."""
