"""What goes out with a trained model: its card, and the way to the hub."""
