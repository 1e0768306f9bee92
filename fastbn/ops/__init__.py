"""The contract: the eight ops, what they take, and how their tensors lie in memory."""
