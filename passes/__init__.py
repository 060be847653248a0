"""The passes from a model to a program, one per file; `pipeline` lists and runs them."""
