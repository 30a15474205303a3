"""How well a world agrees with itself and with its cameras, in numbers."""
