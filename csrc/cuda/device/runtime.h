// The CUDA types that host code needs: cudaError_t and cudaStream_t. Include it as "cuda/device/runtime.h": the
// emulator in tests/emulator shadows that path, and device.cuh's, by coming first among the include directories.
#pragma once

#include <cuda_runtime_api.h>
