"""Running a model, and what is seen: its blocks, their batch, which outputs continue which inputs."""
