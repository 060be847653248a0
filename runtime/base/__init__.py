"""What all of the runtime stands on: errors, the guard operator, rows of a batch, transfers to the host."""
