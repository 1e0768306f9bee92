// Which calls are usual: those that neither torch's transforms nor modes nor tensors of a special kind take part in, so
// that nothing but the kernels of a CPU or a GPU would run. Of the others fastbn.backends.registry decides.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>

#include "node/ops.h"

namespace fastbn {

// Returns whether a tensor's dispatch keys, or those of several tensors, are those of plain tensors. Autocast's keys
// are on every tensor, and the ops have no kernels for them.
inline bool is_plain(c10::DispatchKeySet keys) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet plain({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                                       DispatchKey::AutogradCUDA, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA,
                                       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect});
  return (keys.raw_repr() & ~plain.raw_repr()) == 0;
}

// Returns whether no mode or transform of this thread sees the calls of ops.
inline bool is_plain_thread() {
  return is_plain(c10::impl::tls_local_dispatch_key_set().included_) && !at::impl::torch_function_mode_enabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

// Returns whether autograd records the call: never in inference mode, even where gradients are enabled inside it.
inline bool is_recorded(const Call& c) {
  const auto requires_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  return at::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
         (c.input.requires_grad() || requires_grad(c.residual) || requires_grad(c.weight) || requires_grad(c.bias));
}

// Returns whether a call is usual. What the ops refuse themselves is not asked for: they do that before anything has
// changed.
inline bool is_usual(const Call& c) {
  c10::DispatchKeySet keys = c.input.key_set();
  bool has_inference_tensor = c.input.is_inference();
  for (const OptionalTensor* tensor :
       {&c.residual, &c.weight, &c.bias, &c.running_mean, &c.running_var, &c.num_batches_tracked}) {
    if (!*tensor) continue;
    keys = keys | (*tensor)->key_set();
    has_inference_tensor |= (*tensor)->is_inference();
  }
  if (!is_plain(keys) || !is_plain_thread()) return false;
  if (has_inference_tensor && !c10::InferenceMode::is_enabled()) return false;
  if (c.running_mean.has_value() != c.running_var.has_value()) return false;
  if (!c.training && !c.running_mean) return false;
  if (c.running_mean && (c.running_mean->requires_grad() || c.running_var->requires_grad())) return false;
  const int64_t dim = c.input.dim();
  return c.eps > 0 && dim >= 2 && !(c.training && c.input.numel() == c.input.size(1));
}

}  // namespace fastbn
