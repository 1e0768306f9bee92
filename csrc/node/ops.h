// The fused ops, called below autograd, where a call neither records again nor raises the version of the running
// statistics.
#pragma once

#include <optional>
#include <tuple>

#include "bindings/tensor.h"

namespace fastbn {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The operands of a call in the order of fastbn.ops.dispatch.Call.
struct Call {
  Tensor input;
  OptionalTensor residual, weight, bias, running_mean, running_var, num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  int64_t activation;
  bool training;
  std::optional<double> param;
};

// Which gradients a backward computes.
struct Needs {
  bool input, residual, weight, bias;
};

struct BackwardCall {
  const Tensor &grad_out, &input;
  const OptionalTensor &residual, &mask, &weight, &bias;
  const Tensor &mean, &inv_std;
  bool batch_stats;
  int64_t activation;
  Needs needs;
  std::optional<double> param;
};

// Return output, mean, inv_std and mask, of batch and of frozen statistics, for a call that is usual (usual.h).
FourTensors train(const Call& call, bool save_mask);
FourTensors frozen(const Call& call, bool save_mask);

// Returns the output by running statistics, for a call that is usual.
Tensor eval(const Call& call);

// Returns the gradients of input, weight, bias and residual, undefined or empty where they are not needed.
FourTensors backward(const BackwardCall& call);

}  // namespace fastbn
