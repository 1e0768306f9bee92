// The ops as launches: one for a stream plan; for a two-phase plan reduce, finish, then a second pass over the
// elements.
#include "cuda/kernels/passes.cuh"
#include "cuda/launch.h"

namespace fastbn::cuda {
namespace {

// The workspace of a two-phase plan: two doubles per channel that one launch leaves to the next, then the partial sums.
struct Workspace {
  double* first;
  double* second;
  void* partials;

  Workspace(void* memory, const Layout& layout)
      : first(static_cast<double*>(memory)), second(first + layout.channels), partials(second + layout.channels) {}
};

int64_t bytes_of_sums(const Plan& plan, const Layout& layout) {
  if (plan.schedule == Schedule::stream) return message_bytes(plan);
  constexpr int64_t partial = sizeof(Sums), number = sizeof(double);
  return layout.channels * (plan.splits * partial + 2 * number);
}

}  // namespace

int64_t workspace_bytes(const Plan& plan, const ForwardParams& params) { return bytes_of_sums(plan, params.layout); }

int64_t workspace_bytes(const Plan& plan, const BackwardParams& params) { return bytes_of_sums(plan, params.layout); }

cudaError_t channel_stats(const ForwardParams& given, const Plan& plan, void* memory, cudaStream_t stream) {
  if (!is_runnable(plan, given.layout) || plan.schedule != Schedule::two_phase) return cudaErrorInvalidValue;
  ForwardParams params = given;
  params.inv_std = nullptr;
  params.running_mean = params.running_var = {};
  params.num_batches_tracked = nullptr;
  auto* partials = static_cast<Sums*>(Workspace(memory, params.layout).partials);
  const cudaError_t error = launch_moments(params, plan, partials, stream);
  return error != cudaSuccess ? error : launch_finish_moments(params, plan, partials, stream);
}

cudaError_t forward(const ForwardParams& given, const Plan& plan, void* memory, cudaStream_t stream) {
  if (!is_runnable(plan, given.layout)) return cudaErrorInvalidValue;
  ForwardParams params = given;
  const bool batch = given.statistics == Statistics::batch;
  if (plan.schedule == Schedule::stream) {
    if (!batch) return cudaErrorInvalidValue;
    params.var = nullptr;
    return launch_stream_forward(params, plan, memory, stream);
  }
  if (batch) {
    const Workspace workspace(memory, params.layout);
    if (!params.mean) params.mean = workspace.first;
    if (!params.inv_std) params.inv_std = workspace.second;
    params.var = nullptr;
    auto* partials = static_cast<Sums*>(workspace.partials);
    cudaError_t error = launch_moments(params, plan, partials, stream);
    if (error == cudaSuccess) error = launch_finish_moments(params, plan, partials, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_normalize(params, plan, batch, stream);
}

cudaError_t grad_sums(const BackwardParams& given, const Plan& plan, void* memory, cudaStream_t stream) {
  if (!is_runnable(plan, given.layout) || plan.schedule != Schedule::two_phase) return cudaErrorInvalidValue;
  BackwardParams params = given;
  params.grad_weight = params.grad_bias = {};
  auto* partials = static_cast<Sums*>(Workspace(memory, params.layout).partials);
  const cudaError_t error = launch_grad_sums(params, plan, partials, stream);
  return error != cudaSuccess ? error : launch_finish_grad_sums(params, plan, partials, stream);
}

cudaError_t backward(const BackwardParams& given, const Plan& plan, void* memory, cudaStream_t stream) {
  if (!is_runnable(plan, given.layout)) return cudaErrorInvalidValue;
  const bool batch = given.statistics == Statistics::batch;
  BackwardParams params = given;
  bool finished = false;
  if (params.statistics != Statistics::given) {
    const bool needs_sums = batch && params.grad_input;
    params.sum_grad = nullptr;
    params.sum_grad_xhat = nullptr;
    params.count = nullptr;
    if (plan.schedule == Schedule::stream) {
      return batch ? launch_stream_backward(params, plan, memory, stream) : cudaErrorInvalidValue;
    }
    if (needs_sums || params.grad_weight.defined() || params.grad_bias.defined()) {
      const Workspace workspace(memory, params.layout);
      if (needs_sums) {
        params.sum_grad = workspace.first;
        params.sum_grad_xhat = workspace.second;
      }
      auto* partials = static_cast<Sums*>(workspace.partials);
      cudaError_t error = launch_grad_sums(params, plan, partials, stream);
      if (error == cudaSuccess) error = launch_finish_grad_sums(params, plan, partials, stream);
      if (error != cudaSuccess || !batch) return error;  // frozen: no gradient is left
      finished = true;
    }
  }
  if (!params.grad_input && !params.grad_residual) return cudaSuccess;
  return launch_input_grad(params, plan, finished, stream);
}

}  // namespace fastbn::cuda
