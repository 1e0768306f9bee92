"""Fusion of what follows a normalisation: another forward for the modules that call both."""
