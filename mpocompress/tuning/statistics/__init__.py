"""What the dense model does on data: moments of inputs, gradients at outputs, use of tables."""
