"""What a diffusers pipeline is given in place of the model."""
