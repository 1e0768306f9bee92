// torch.ops.fastbn_emulator: the CUDA ops' own bindings and kernels, run by the emulator on CPU tensors.
#include "bindings/ops.h"

#include <pybind11/pybind11.h>

#include "bindings/cuda_backend.h"
#include "emulator.h"
#include "plan/planner.h"

namespace fastbn {
namespace {

// Limits of the emulated GPU: few SMs, so that plans split the small shapes of tests, and no room on chip.
DeviceLimits emulated_limits{"emulator", 2, 0, 1, 65536};

// Blocks per group of cooperative plans, which then have two groups if there are two channel tiles. The planner would
// not choose such plans for small shapes. 0 leaves the choice to the planner.
int blocks_per_group = 0;

// Sets the limits. With room on chip plans are resident, and clusters grow until there is one block per SM.
void set_limits(int sm_count, int64_t shared_bytes_per_block, int max_cluster, int cooperative_blocks) {
  blocks_per_group = cooperative_blocks;
  emulated_limits.sm_count = sm_count;
  emulated_limits.shared_bytes_per_block = shared_bytes_per_block;
  emulated_limits.max_cluster = max_cluster;
}

struct EmulatorContext {
  explicit EmulatorContext(const Tensor&) {}
  cudaStream_t stream() const { return {}; }
  Plan plan(const Request& request) const {
    const Plan chosen = choose_plan(request, emulated_limits);
    if (blocks_per_group == 0 || !request.cooperative || !is_one_pass(chosen)) return chosen;
    Plan plan = choose_walk(request);
    const int64_t room = emulated_limits.shared_bytes_per_block;
    if (!fit_on_chip(request, Schedule::cooperative, blocks_per_group, room, plan)) return chosen;
    plan.groups = std::min(plan.tiles, 2);
    add_traffic(request, plan);
    return plan;
  }
};

}  // namespace
}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(fastbn_emulator, CPU, m) {
  fastbn::Ops<fastbn::CudaBackend<fastbn::EmulatorContext>>::register_all(m);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("set_limits", &fastbn::set_limits, "Set the limits of the emulated GPU that the planner sees.",
        pybind11::kw_only(), pybind11::arg("sm_count"), pybind11::arg("shared_bytes_per_block"),
        pybind11::arg("max_cluster"), pybind11::arg("blocks_per_group"));
  m.def("launches", &fastbn::emulator::launches, "Return how many launches ran.");
  m.def("set_seed", &fastbn::emulator::set_seed, "Restart the schedule of fibres from a seed.");
}
