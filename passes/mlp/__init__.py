"""The MLPs of a graph: finding them, cutting their weights, and the graph at a width."""
