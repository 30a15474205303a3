"""The networks, on the host's classes. The only package of lyra_core that imports the host."""
