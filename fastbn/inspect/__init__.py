"""Reports on a build, a device or a call."""
