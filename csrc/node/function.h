// The fused op as a C++ autograd function: an accelerator of fastbn.autograd.batch_norm.BatchNormFunction, which
// defines what it does. It saves the same tensors in the same order.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include "node/ops.h"

namespace fastbn {

// Thrown by a forward whose op has refused its arguments or could not run. Nothing has changed.
struct Refused {};

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static constexpr bool is_traceable = true;

  // `call` holds the other operands as well: those that have a gradient are arguments, since autograd looks for them
  // there.
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias, const Call& call);
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& grads);
};

}  // namespace fastbn
