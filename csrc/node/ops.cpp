// A call of an op goes straight to the launcher where torch's dispatcher would do nothing else, which saves its boxing
// of arguments: 1 to 2 us. Otherwise it goes through the dispatcher: a profiler or a mode has to see it.
#include "node/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include "bindings/ops.h"
#include "node/table_backend.h"
#include "node/usual.h"

namespace fastbn {

const LauncherTable* launcher_table = nullptr;

namespace {

using Direct = Ops<TableBackend>;

bool is_profiled() { return at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value(); }

// Returns whether the kernel for plain tensors is all that a call of an op would run.
bool is_direct(const BackwardCall& call) {
  c10::DispatchKeySet keys = call.grad_out.key_set() | call.input.key_set() | call.mean.key_set() |
                             call.inv_std.key_set() | c10::impl::tls_local_dispatch_key_set().included_;
  for (const OptionalTensor* tensor : {&call.residual, &call.mask, &call.weight, &call.bias})
    if (*tensor) keys = keys | (*tensor)->key_set();
  return is_plain(keys) && !is_profiled();
}

// The ops of csrc/bindings/schemas.cpp.
using Train = FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                          const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, std::optional<double>,
                          double, int64_t, bool, std::optional<double>);
using Frozen = FourTensors(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                           const Tensor&, const Tensor&, double, int64_t, bool, std::optional<double>);
using Eval = Tensor(const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&,
                    const Tensor&, double, int64_t, std::optional<double>);
using Backward = FourTensors(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, const Tensor&, const Tensor&, bool, int64_t,
                             bool, bool, bool, bool, std::optional<double>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

FourTensors train(const Call& c, bool save_mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](auto&& op) {
    return op(c.input, c.residual, c.weight, c.bias, c.running_mean, c.running_var, c.num_batches_tracked, c.momentum,
              c.eps, c.activation, save_mask, c.param);
  };
  if (!is_profiled()) return run(Direct::batch_norm_train);
  static const auto op = find<Train>("fastbn::batch_norm_train");
  return run([](auto&&... arguments) { return op.call(arguments...); });
}

FourTensors frozen(const Call& c, bool save_mask) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](auto&& op) {
    return op(c.input, c.residual, c.weight, c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, save_mask,
              c.param);
  };
  if (!is_profiled()) return run(Direct::batch_norm_frozen);
  static const auto op = find<Frozen>("fastbn::batch_norm_frozen");
  return run([](auto&&... arguments) { return op.call(arguments...); });
}

Tensor eval(const Call& c) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](auto&& op) {
    return op(c.input, c.residual, c.weight, c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, c.param);
  };
  if (!is_profiled()) return run(Direct::batch_norm_eval);
  static const auto op = find<Eval>("fastbn::batch_norm_eval");
  return run([](auto&&... arguments) { return op.call(arguments...); });
}

FourTensors backward(const BackwardCall& c) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto run = [&](auto&& op) {
    return op(c.grad_out, c.input, c.residual, c.mask, c.weight, c.bias, c.mean, c.inv_std, c.batch_stats, c.activation,
              c.needs.input, c.needs.weight, c.needs.bias, c.needs.residual, c.param);
  };
  if (is_direct(c)) return run(Direct::batch_norm_backward);
  static const auto op = find<Backward>("fastbn::batch_norm_backward");
  return run([](auto&&... arguments) { return op.call(arguments...); });
}

}  // namespace fastbn
