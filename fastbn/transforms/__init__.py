"""What changes a whole model."""
