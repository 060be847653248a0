"""Recorded calls of a transformer: made, kept, read, and made again with another model."""
