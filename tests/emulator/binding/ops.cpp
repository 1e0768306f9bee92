// torch.ops.fastbn_emulator: the CUDA ops' own bindings and kernels, run by the emulator on CPU tensors.
#include <pybind11/pybind11.h>

#include "bindings/cuda_backend.h"
#include "bindings/ops.h"
#include "emulator.h"

namespace fastbn {
namespace {

// A machine so small that plans split the small shapes of tests.
constexpr DeviceLimits emulated_limits{"emulator", 2, 16384, 4, 65536};

struct EmulatorContext {
  explicit EmulatorContext(const Tensor&) {}
  cudaStream_t stream() const { return {}; }
  const DeviceLimits& limits() const { return emulated_limits; }
};

}  // namespace
}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(fastbn_emulator, CPU, m) {
  fastbn::Ops<fastbn::CudaBackend<fastbn::EmulatorContext>>::register_all(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_seed", &fastbn::emulator::set_seed, "Restart the schedule of fibres from a seed.");
}
