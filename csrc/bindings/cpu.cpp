// The ops on CPU tensors, on torch's threads.
#include "bindings/ops.h"
#include "cpu/launch.h"

namespace fastbn {
namespace {

void run_on_torch_threads(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(begin, end, context); });
}

struct CpuBackend {
  cpu::Threads threads{int(torch::stable::get_num_threads()), run_on_torch_threads};

  explicit CpuBackend(const Operands&) {}
  void forward(const ForwardParams& params) { cpu::forward(params, threads); }
  void channel_stats(const ForwardParams& params) { cpu::channel_stats(params, threads); }
  void backward(const BackwardParams& params) { cpu::backward(params, threads); }
  void grad_sums(const BackwardParams& params) { cpu::grad_sums(params, threads); }
};

}  // namespace
}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(FASTBN_NAMESPACE, CPU, m) { fastbn::Ops<fastbn::CpuBackend>::register_all(m); }
