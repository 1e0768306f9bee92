// The CUDA backend as the bindings see it: the contract's ops as sequences of launches on a stream. Nothing here
// allocates or waits; pointers are to device memory, and a plan is one that choose_plan made for the same layout.
#pragma once

#include <cstdint>

#include "cuda/device/runtime.h"
#include "math/params.h"
#include "plan/device.h"
#include "plan/plan.h"

namespace fastbn::cuda {

// Returns the size of the `workspace` that the functions below need, aligned to 16 bytes.
int64_t workspace_bytes(const Plan& plan, const ForwardParams& params);
int64_t workspace_bytes(const Plan& plan, const BackwardParams& params);

// batch: statistics, running averages, output. running or given: output in one launch; with running, mean and inv_std
// are written where not null. The workspace may be null for these two.
cudaError_t forward(const ForwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// mean and var, and nothing else.
cudaError_t channel_stats(const ForwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// The gradients whose pointers are not null, with only the launches that they need. running: frozen statistics. given:
// sum_grad, sum_grad_xhat and count are read, and grad_weight and grad_bias are left alone.
cudaError_t backward(const BackwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Writes sum_grad and sum_grad_xhat, whichever are not null, and nothing else.
cudaError_t grad_sums(const BackwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Of one device, which is the current one; `name` is left as it was. Not part of the emulator's build, which has no
// device to ask.
cudaError_t device_limits(int device, DeviceLimits* limits);

}  // namespace fastbn::cuda
