"""What the transformer is told of a chunk: packed history, correspondences, rays, schedules."""
