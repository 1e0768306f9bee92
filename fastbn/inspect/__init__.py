"""What tells of a build, a device and a call."""
