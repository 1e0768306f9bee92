"""Functions that change a whole model."""
