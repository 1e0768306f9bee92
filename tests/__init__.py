"""Tests of fastbn. Without a GPU they run the Triton kernels in Triton's interpreter, which the environment chooses
before Triton is imported.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
