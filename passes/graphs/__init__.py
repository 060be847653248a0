"""What passes hand to each other: graphs, what was seen of a model, and what it costs."""
