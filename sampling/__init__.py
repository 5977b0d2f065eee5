"""What is to be drawn from a model, how, and where it is kept."""
