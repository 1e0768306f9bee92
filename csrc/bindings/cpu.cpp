// Implements the ops for CPU tensors, on torch's threads.
#include <new>

#include "bindings/stable.h"
#include "cpu/launch.h"

namespace fastbn {
namespace {

void run_on_torch_threads(int64_t count, int64_t grain, void (*task)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { task(begin, end, context); });
}

// The Backend of Ops for CPU tensors.
struct CpuBackend {
  const char* op;
  cpu::Threads threads{int(torch::stable::get_num_threads()), run_on_torch_threads};

  explicit CpuBackend(const Site& site) : op(site.op()) {}
  void forward(const ForwardParams& params) { run(cpu::forward, params); }
  void channel_stats(const ForwardParams& params) { run(cpu::channel_stats, params); }
  void backward(const BackwardParams& params) { run(cpu::backward, params); }
  void grad_sums(const BackwardParams& params) { run(cpu::grad_sums, params); }

  // Runs a launcher, which allocates a workspace of a few numbers per channel before it writes anything. If that fails,
  // the error has the type and text by which tools recognise torch's CPU allocator, instead of Python's MemoryError.
  template <class Launcher, class Params>
  void run(Launcher launcher, const Params& params) {
    try {
      launcher(params, threads);
    } catch (const std::bad_alloc&) {
      fail(op, "DefaultCPUAllocator: can't allocate memory for the workspace of ", params.layout.channels, " channels");
    }
  }
};

}  // namespace

const Launchers cpu_launchers = launchers_of<CpuBackend>();

}  // namespace fastbn

STABLE_TORCH_LIBRARY_IMPL(FASTBN_NAMESPACE, CPU, m) { fastbn::register_ops<fastbn::CpuBackend>(m); }
