// The ops on CUDA tensors. The symbol for the stream is in libtorch_cuda and is looked up at run time, so that the same
// binary also loads under a torch without CUDA. torch loads that library with local symbols, so it has to be named.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <mutex>
#include <vector>

#include "bindings/cuda_backend.h"
#include "bindings/max_sms.h"
#include "bindings/stable.h"
#include "plan/planner.h"

namespace fastbn {
namespace {

using StreamShim = AOTITorchError (*)(int32_t, void**);

StreamShim find_stream_shim() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<StreamShim>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
}

cudaStream_t current_stream(int32_t device) {
  static const StreamShim shim = find_stream_shim();
  void* stream = nullptr;
  if (!shim || shim(device, &stream) != 0) fail("fastbn", "expected a torch built with CUDA, got one without");
  return static_cast<cudaStream_t>(stream);
}

const DeviceLimits& limits_of(int32_t device) {
  static std::mutex mutex;
  static std::vector<DeviceLimits> known(64);
  const std::scoped_lock lock(mutex);
  DeviceLimits& limits = known.at(size_t(device));
  if (limits.sm_count == 0) {
    limits.name = "cuda";
    const cudaError_t error = cuda::device_limits(device, &limits);
    if (error != cudaSuccess)
      fail("fastbn", "cannot read the limits of device ", device, ": ", cudaGetErrorString(error));
  }
  return limits;
}

class TorchContext {
 public:
  explicit TorchContext(int32_t device) : device_(device), guard_(device) {}
  cudaStream_t stream() const { return current_stream(device_); }
  Plan plan(const Request& request) const { return choose_plan(request, within_max_sms(limits_of(device_), max_sms)); }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace

bool finds_cuda_stream() { return find_stream_shim() != nullptr; }

const DeviceLimits& limits_of_device(int32_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  return limits_of(device);
}

const Launchers cuda_launchers = launchers_of<CudaBackend<TorchContext>>();

}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(FASTBN_NAMESPACE, CUDA, m) {
  fastbn::register_ops<fastbn::CudaBackend<fastbn::TorchContext>>(m);
}
