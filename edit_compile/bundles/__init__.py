"""What can be done with a bundle: built, inspected, verified."""
