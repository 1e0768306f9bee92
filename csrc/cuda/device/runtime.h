// The CUDA types that host code needs: cudaError_t and cudaStream_t. Include it as "cuda/device/runtime.h":
// tests/emulator comes first among the include directories and replaces that path, and device.cuh's.
#pragma once

#include <cuda_runtime_api.h>
