// What the planner must know of a device, by attributes one at a time: cudaGetDeviceProperties takes milliseconds.
// Empty for g++: the emulator has no device to ask.
#ifdef __CUDACC__

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace fastbn::cuda {

cudaError_t device_limits(int device, DeviceLimits* limits) {
  cudaError_t error = cudaSuccess;
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
    return value;
  };
  DeviceLimits asked = *limits;
  asked.sm_count = attribute(cudaDevAttrMultiProcessorCount);
  asked.shared_bytes_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  asked.l2_bytes = attribute(cudaDevAttrL2CacheSize);
  asked.max_cluster = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? device::kMaxCluster : 1;
  if (error == cudaSuccess) *limits = asked;
  return error;
}

}  // namespace fastbn::cuda

#endif
