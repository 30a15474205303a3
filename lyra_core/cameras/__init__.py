"""Cameras and paths: records, presets, editing, files and pictures of them."""
