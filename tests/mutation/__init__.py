"""Plants known faults one at a time in copies of the tree, to see which tests notice: `python -m tests.mutation`."""
