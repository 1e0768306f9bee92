// torch.ops.fastbn_emulator: the CUDA ops' own bindings and kernels, run by the emulator on CPU tensors.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "bindings/allocate_in_python.h"
#include "bindings/cuda_backend.h"
#include "bindings/stable.h"
#include "emulator.h"
#include "plan/planner.h"
#include "python/allocate.h"

namespace fastbn {
namespace {

// Limits of the emulated GPU: few SMs, so that plans split the small shapes of tests, and no room on chip.
DeviceLimits emulated_limits{"emulator", 2, 0, 65536};

// Splits per group of stream plans, which then have two groups if there are two channel tiles: the planner would give
// the small tiles of tests to one block each. 0 leaves the choice to the planner.
int stream_splits = 0;

void set_limits(int sm_count, int64_t shared_bytes_per_block, int splits) {
  emulated_limits.sm_count = sm_count;
  emulated_limits.shared_bytes_per_block = shared_bytes_per_block;
  stream_splits = splits;
}

Plan split_further(const Request& request, Plan plan) {
  plan.groups = std::min(plan.tiles, 2);
  set_stream_splits(stream_splits, plan);
  for (int ahead = 1; ahead >= 0; --ahead) {
    if (set_ring(request, ahead, emulated_limits.shared_bytes_per_block, plan)) return plan;
  }
  throw std::runtime_error("expected a plan whose tiles fit in the ring");
}

int blocks_per_sm(const std::string& pass, bool rows, int64_t element_size, bool aligned) {
  const std::pair<const char*, Pass> passes[] = {{"moments", Pass::moments},
                                                 {"normalize", Pass::normalize},
                                                 {"grad_sums", Pass::grad_sums},
                                                 {"input_grad", Pass::input_grad}};
  for (const auto& [name, value] : passes) {
    if (pass == name) {
      return compiled_blocks_per_sm(value, rows ? Kernel::row_tiles : Kernel::channel_tiles, element_size, aligned);
    }
  }
  throw std::invalid_argument("pass: expected one of moments, normalize, grad_sums, input_grad, got '" + pass + "'");
}

struct EmulatorContext {
  explicit EmulatorContext(int32_t) {}
  cudaStream_t stream() const { return {}; }
  Plan plan(const Request& request) const {
    const Plan chosen = choose_plan(request, emulated_limits);
    const bool splits = stream_splits > 0 && request.cooperative && chosen.schedule == Schedule::stream;
    return splits ? split_further(request, chosen) : chosen;
  }
};

}  // namespace
}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(fastbn_emulator, CPU, m) {
  fastbn::register_ops<fastbn::CudaBackend<fastbn::EmulatorContext>>(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  fastbn::allocate_in_python = fastbn::call_allocate;
  m.def("set_limits", &fastbn::set_limits, "Set the limits of the emulated GPU that the planner sees.",
        pybind11::kw_only(), pybind11::arg("sm_count"), pybind11::arg("shared_bytes_per_block"),
        pybind11::arg("stream_splits"));
  m.def("blocks_per_sm", &fastbn::blocks_per_sm,
        "Return how many blocks of a pass the planner expects an SM to hold, by their registers.",
        pybind11::arg("pass"), pybind11::kw_only(), pybind11::arg("rows"), pybind11::arg("element_size"),
        pybind11::arg("aligned"));
  m.def("launches", &fastbn::emulator::launches, "Return how many launches ran.");
  m.def("set_seed", &fastbn::emulator::set_seed, "Restart the schedule of fibres from a seed.");
}
