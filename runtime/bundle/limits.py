"""How large the parts of a bundle may be, each limit with its reason; what is larger is refused before it is read.

A limit is some hundred times what compiled models come to, and no more than can be read in a few seconds.
"""

from __future__ import annotations

MANIFEST_BYTES = 64 << 20
"""Of manifest.json; a second's reading."""

GRAPH_BYTES = 256 << 20
"""Of a graph's file. Graphs hold no weights; those in ONNX may hold tables (of positions, say) of some MB."""

GRAPHS_BYTES = 512 << 20
"""Of all files of graphs together, which are held in memory. A link counts as what it leads to."""

JSON_BYTES = 64 << 20
"""Of the JSON in a graph's file, which takes ten times as much memory when it is parsed."""

NODES = 20_000
"""Of a graph: Python compiles a function of as many lines in a few seconds."""

INTEGER = (1 << 63) - 1
"""Of whole numbers: sizes and indices are of 64 bits."""

EXPONENT = 64
"""Of a power of a size, and by how many bits one is shifted."""

INTEGER_BITS = 4096
"""Of what arithmetic on sizes may give, in bits: a product of sizes has 64 for each, and Python's integers no limit."""

MADE = 1 << 30
"""Elements of a tensor that is made of numbers in the graph alone: a mask of 32,768 by 32,768 tokens."""

SIZES = 1 << 34
"""Product of the sizes that a graph writes down for any other tensor: 32 GiB in half precision."""
