"""From graphs to a program: plans, numbers compared, one copy of the weights, and a manifest."""
