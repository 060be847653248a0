"""The elastic model: routers on a transformer's blocks, its layout, and its files."""
