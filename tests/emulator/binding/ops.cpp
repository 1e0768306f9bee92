// torch.ops.fastbn_emulator: the CUDA ops' own bindings and kernels, run by the emulator on CPU tensors.
#include "bindings/ops.h"

#include <pybind11/pybind11.h>

#include "bindings/cuda_backend.h"
#include "emulator.h"
#include "plan/planner.h"

namespace fastbn {
namespace {

// Limits of the emulated GPU: few SMs, so that plans split the small shapes of tests, and no room on chip.
DeviceLimits emulated_limits{"emulator", 2, 0, 65536};

void set_limits(int sm_count, int64_t shared_bytes_per_block) {
  emulated_limits.sm_count = sm_count;
  emulated_limits.shared_bytes_per_block = shared_bytes_per_block;
}

struct EmulatorContext {
  explicit EmulatorContext(const Tensor&) {}
  cudaStream_t stream() const { return {}; }
  Plan plan(const Request& request) const { return choose_plan(request, emulated_limits); }
};

}  // namespace
}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(fastbn_emulator, CPU, m) {
  fastbn::Ops<fastbn::CudaBackend<fastbn::EmulatorContext>>::register_all(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_limits", &fastbn::set_limits, "Set the limits of the emulated GPU that the planner sees.",
        pybind11::kw_only(), pybind11::arg("sm_count"), pybind11::arg("shared_bytes_per_block"));
  m.def("launches", &fastbn::emulator::launches, "Return how many launches ran.");
  m.def("set_seed", &fastbn::emulator::set_seed, "Restart the schedule of fibres from a seed.");
}
