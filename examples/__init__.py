"""Programs that use fastbn: `python -m examples.lenet`."""
