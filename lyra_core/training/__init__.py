"""Learning: what a window of a video shows the network, histories that it spoils itself, and the loss."""
