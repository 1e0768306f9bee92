"""Every op of the contract in Triton: for GPUs that the extension has no kernels for, and to be read.

docs/triton.md explains the kernels line by line. Only `ops` imports Triton, when the first op runs.
"""
