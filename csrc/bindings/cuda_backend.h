// The CUDA launchers as a Backend of the ops: plan, workspace, launch, check. `Context` provides plan and stream: those
// of torch's device, or in tests those of the emulator.
#pragma once

#include <utility>

#include "bindings/arguments.h"
#include "cuda/launch.h"

namespace fastbn {

// Returns whether torch's current CUDA stream can be asked for, which takes a torch that was built with CUDA.
bool finds_cuda_stream();

// Returns the limits of a device, which are asked for once.
const DeviceLimits& limits_of_device(int32_t device);

template <class Context>
class CudaBackend {
 public:
  explicit CudaBackend(Site& site) : site_(site), context_(site.device()) {}

  void forward(const ForwardParams& params) {
    const auto direction = params.statistics == Statistics::batch ? Direction::forward : Direction::eval;
    run(cuda::forward, params, request_of(params, direction), {params.input, params.residual, params.output});
  }

  void channel_stats(const ForwardParams& params) {
    Request request = request_of(params, Direction::forward);
    request.fused = false;
    run(cuda::channel_stats, params, request, {params.input});
  }

  void backward(const BackwardParams& params) {
    const bool frozen = params.statistics == Statistics::running;
    Request request = request_of(params, frozen ? Direction::frozen_backward : Direction::backward);
    // Only the gradient of the input needs both the elements and their sums.
    request.fused = params.statistics == Statistics::batch && params.grad_input;
    run(cuda::backward, params, request,
        {params.grad_out, params.input, params.residual, params.grad_input, params.grad_residual});
  }

  void grad_sums(const BackwardParams& params) {
    Request request = request_of(params, Direction::backward);
    request.fused = false;
    run(cuda::grad_sums, params, request, {params.grad_out, params.input, params.residual});
  }

 private:
  template <class Params>
  static Request request_of(const Params& params, Direction direction) {
    return {.layout = params.layout,
            .dtype = params.dtype,
            .direction = direction,
            .activation = params.activation,
            .residual = params.residual != nullptr,
            .masked = params.mask != nullptr};
  }

  template <class Launcher, class Params>
  void run(Launcher launcher, const Params& params, Request request, std::initializer_list<const void*> pointers) {
    for (const void* pointer : pointers) request.aligned &= reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    Plan plan;
    cudaError_t error;
    do {
      plan = context_.plan(request);
      void* const workspace = site_.workspace(cuda::workspace_bytes(plan, params));
      error = launcher(params, plan, workspace, context_.stream());
      // A cooperative grid can be too large when another process uses the GPU, or a tool its registers. Nothing has run
      // then, because a cooperative plan is a single launch. Without splits most stream plans need no such grid; those
      // with a cumulative average do.
    } while (error == cudaErrorCooperativeLaunchTooLarge &&
             (std::exchange(request.cooperative, false) || std::exchange(request.fused, false)));
    if (error != cudaSuccess)
      fail(site_.op(), "expected the CUDA launch to succeed, got ", cudaGetErrorString(error), " (grid ",
           plan.groups * plan.splits, " blocks of ", plan.threads, " threads)");
  }

  Site& site_;
  Context context_;
};

}  // namespace fastbn
