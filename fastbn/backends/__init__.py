"""Implementations of the contract."""
