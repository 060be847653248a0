"""What remains of a model around its blocks."""
