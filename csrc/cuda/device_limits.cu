// Limits of a device for the planner. They are asked for one attribute at a time: cudaGetDeviceProperties takes
// milliseconds. Empty for g++: the emulator has no device to ask.
#ifdef __CUDACC__

#include "cuda/device/device.cuh"
#include "cuda/launch.h"

namespace fastbn::cuda {
namespace {

// A kernel that is compiled as the others are, so that its attributes tell which code the device runs.
FASTBN_GLOBAL void probe_kernel() {}

}  // namespace

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
  if (error != cudaSuccess) return error;
  // Two transfers per clock; a copy reaches 7/8 of that on an H200. Not all drivers report clocks.
  const double kilohertz = attribute(cudaDevAttrMemoryClockRate), bits = attribute(cudaDevAttrGlobalMemoryBusWidth);
  if (error != cudaSuccess) cudaGetLastError();  // clear the error, so that the next launch does not report it
  asked.has_mbarriers = device::code_version(reinterpret_cast<const void*>(&probe_kernel)) >= 80;
  if (kilohertz * bits > 0) asked.copy_bytes_per_us = kilohertz * 1e-3 * 2 * bits / 8 * 7 / 8;
  *limits = asked;
  return cudaSuccess;
}

}  // namespace fastbn::cuda

#endif
