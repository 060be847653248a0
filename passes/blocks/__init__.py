"""From a block's code to a graph of plain operators on real numbers."""
