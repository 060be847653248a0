"""Routers and policies: from a block's states to what is done with each row of it."""
