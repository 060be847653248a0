"""Tuning: which steps a compiled transformer computes and in which it reuses, told from recorded calls."""
