"""A world: begun, planned, appended to, rewound, kept in a folder, previewed, captioned. Open `world.py` first."""
