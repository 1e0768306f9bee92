// The CUDA backend as the bindings see it: the contract's ops as sequences of launches on a stream. Nothing here
// allocates or waits. Pointers are to device memory, and a plan comes from choose_plan for the same layout.
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

// Normalises. Statistics::batch: also computes the statistics and updates the running averages. running and given:
// takes one launch and no workspace; running also writes mean and inv_std where not null.
cudaError_t forward(const ForwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Writes mean and var, and nothing else.
cudaError_t channel_stats(const ForwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Writes the gradients whose pointers are not null, with only the launches that they need. Statistics::running: the
// statistics are frozen. given: reads sum_grad, sum_grad_xhat and count, and leaves grad_weight and grad_bias alone.
cudaError_t backward(const BackwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Writes sum_grad and sum_grad_xhat, whichever are not null, and nothing else.
cudaError_t grad_sums(const BackwardParams& params, const Plan& plan, void* workspace, cudaStream_t stream);

// Sets the limits of `device`, which must be the current one; leaves `name` as it was. The emulator does not have it.
cudaError_t device_limits(int device, DeviceLimits* limits);

}  // namespace fastbn::cuda
