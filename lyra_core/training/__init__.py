"""Learning: what a window of a video shows the network, histories that it spoils itself, the loss, its steps and its files."""
