"""What is remembered between calls: which generation a call belongs to, residuals, traces."""
