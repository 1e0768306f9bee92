// The CUDA launchers as a Backend of the ops: plan, workspace, launch, check. `Context` says on which stream of what
// device: torch's, or in the tests the emulator's.
#pragma once

#include "bindings/arguments.h"
#include "cuda/launch.h"

namespace fastbn {

// Whether torch's current CUDA stream can be asked for: the torch in this process was built with CUDA.
bool finds_cuda_stream();

template <class Context>
class CudaBackend {
 public:
  explicit CudaBackend(const Operands& operands) : operands_(operands), context_(operands.input()) {}

  void forward(const ForwardParams& params) {
    const auto direction = params.statistics == Statistics::batch ? Direction::forward : Direction::eval;
    run(cuda::forward, params, direction, params.residual, {params.input, params.residual, params.output});
  }

  void channel_stats(const ForwardParams& params) {
    run(cuda::channel_stats, params, Direction::forward, nullptr, {params.input});
  }

  void backward(const BackwardParams& params) {
    const auto direction = params.statistics == Statistics::running ? Direction::frozen_backward : Direction::backward;
    run(cuda::backward, params, direction, params.residual,
        {params.grad_out, params.input, params.residual, params.grad_input, params.grad_residual});
  }

  void grad_sums(const BackwardParams& params) {
    run(cuda::grad_sums, params, Direction::backward, params.residual,
        {params.grad_out, params.input, params.residual});
  }

 private:
  template <class Launcher, class Params>
  void run(Launcher launcher, const Params& params, Direction direction, const void* residual,
           std::initializer_list<const void*> pointers) {
    Request request{params.layout, params.dtype, direction, params.activation, residual != nullptr, true};
    for (const void* pointer : pointers) request.aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    const Plan plan = choose_plan(request, context_.limits());
    const Tensor workspace = operands_.empty(cuda::workspace_bytes(plan, params.layout), ScalarType::Byte);
    const cudaError_t error = launcher(params, plan, workspace.data_ptr(), context_.stream());
    if (error != cudaSuccess)
      fail(operands_.op(), "expected the CUDA launch to succeed, got ", cudaGetErrorString(error), " (grid ",
           plan.grid_x, " x ", plan.splits, ", ", plan.threads, " threads)");
  }

  const Operands& operands_;
  Context context_;
};

}  // namespace fastbn
