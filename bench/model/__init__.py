"""A timing model of the CUDA kernels: the cycles of hot loops from machine code, and from these the time of a plan.

Nothing here needs a GPU. What it says are predictions, fitted to committed measurements; bench/README.md has its error
and its limits.
"""
