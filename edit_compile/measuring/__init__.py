"""Latency, measured and drawn."""
