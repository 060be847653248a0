"""What a bundle says and holds: its data, its files, and reading them without running anything."""
