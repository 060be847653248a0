"""The passes from a model to a program; `pipeline` lists and runs them."""
