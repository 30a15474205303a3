"""What is known of the world's geometry: depth, its scale, warps, and which past frames see a view."""
