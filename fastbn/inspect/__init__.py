"""What reports on a build, a device or a call."""
