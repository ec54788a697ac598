"""Training a compressed model to do what the dense one does, without labels."""
