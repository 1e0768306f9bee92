// A call of an op goes straight to the launcher where torch's dispatcher would do nothing else, which saves its boxing
// of arguments: 1 to 2 us. Otherwise it goes through the dispatcher: a profiler or a mode has to see it.
#include "node/ops.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <type_traits>

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

// Calls an op by its function for the tensors of this folder, or by its name through the dispatcher.
template <auto function, class... Arguments>
auto call(const char* name, bool directly, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (directly) return function(arguments...);
  using Signature = std::remove_pointer_t<decltype(function)>;
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op.call(arguments...);
}

}  // namespace

FourTensors train(const Call& c, bool save_mask) {
  return call<&Direct::batch_norm_train>("fastbn::batch_norm_train", !is_profiled(), c.input, c.residual, c.weight,
                                         c.bias, c.running_mean, c.running_var, c.num_batches_tracked, c.momentum,
                                         c.eps, c.activation, save_mask, c.param);
}

FourTensors frozen(const Call& c, bool save_mask) {
  return call<&Direct::batch_norm_frozen>("fastbn::batch_norm_frozen", !is_profiled(), c.input, c.residual, c.weight,
                                          c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, save_mask,
                                          c.param);
}

Tensor eval(const Call& c) {
  return call<&Direct::batch_norm_eval>("fastbn::batch_norm_eval", !is_profiled(), c.input, c.residual, c.weight,
                                        c.bias, *c.running_mean, *c.running_var, c.eps, c.activation, c.param);
}

FourTensors backward(const BackwardCall& c) {
  return call<&Direct::batch_norm_backward>(
      "fastbn::batch_norm_backward", is_direct(c), c.grad_out, c.input, c.residual, c.mask, c.weight, c.bias, c.mean,
      c.inv_std, c.batch_stats, c.activation, c.needs.input, c.needs.weight, c.needs.bias, c.needs.residual, c.param);
}

}  // namespace fastbn
