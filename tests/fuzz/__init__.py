"""Differential fuzzing: drawn calls of fastbn against stock torch and against extended precision.

`python -m tests.fuzz --help` runs many; tests/fuzz/test_fuzz.py runs some.
"""
