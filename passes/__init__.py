"""Graph in, graph and report out: the passes, one per file."""
