// The ops of csrc/bindings/schemas.cpp, called through torch's dispatcher below autograd, where a call neither records
// again nor raises the version of the running statistics.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace fastbn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
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

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Returns output, mean, inv_std and mask.
inline FourTensors train(const Call& c, bool save_mask) {
  using Op = FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>,
                         double, int64_t, bool, std::optional<double>);
  static const auto op = find<Op>("fastbn::batch_norm_train");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(c.input, c.residual, c.weight, c.bias, c.running_mean, c.running_var, c.num_batches_tracked,
                 c.momentum, c.eps, c.activation, save_mask, c.param);
}

inline FourTensors frozen(const Call& c, bool save_mask) {
  using Op = FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                         const Tensor&, const Tensor&, double, int64_t, bool, std::optional<double>);
  static const auto op = find<Op>("fastbn::batch_norm_frozen");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(c.input, c.residual, c.weight, c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, save_mask,
                 c.param);
}

inline Tensor eval(const Call& c) {
  using Op = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                    const Tensor&, double, int64_t, std::optional<double>);
  static const auto op = find<Op>("fastbn::batch_norm_eval");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(c.input, c.residual, c.weight, c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, c.param);
}

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

// Returns the gradients of input, weight, bias and residual.
inline FourTensors backward(const BackwardCall& c) {
  using Op = FourTensors(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, int64_t,
                         bool, bool, bool, bool, std::optional<double>);
  static const auto op = find<Op>("fastbn::batch_norm_backward");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(c.grad_out, c.input, c.residual, c.mask, c.weight, c.bias, c.mean, c.inv_std, c.batch_stats,
                 c.activation, c.needs.input, c.needs.weight, c.needs.bias, c.needs.residual, c.param);
}

}  // namespace fastbn
