"""The shipped graphs: what is in them, where it stands, and how the frontend writes that down."""
