"""Gaussians: made, drawn, fitted, aligned, written and read."""
