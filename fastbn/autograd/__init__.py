"""Derivatives: the autograd Function over the fused ops, and its double backward."""
