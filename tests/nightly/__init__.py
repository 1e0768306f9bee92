"""Long checks for each night, or before a release: `python -m tests.nightly` runs them and records the outcome."""
