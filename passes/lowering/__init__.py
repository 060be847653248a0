"""From graphs to the files of engines."""
