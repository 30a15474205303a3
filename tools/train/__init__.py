"""A small world to learn in, and the small Lyra 2 that learns in it: scenes, codec, text table, transformer."""
