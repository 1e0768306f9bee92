// The registration of ops by LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/ops.h"

#ifndef FASTBN_NAMESPACE
#define FASTBN_NAMESPACE fastbn
#endif

namespace fastbn {

// Registers the eight ops over a backend.
template <class Backend>
void register_ops(torch::stable::detail::StableLibrary& m) {
  using O = Ops<Backend>;
  m.impl("batch_norm_train", TORCH_BOX(&O::batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&O::batch_norm_eval));
  m.impl("batch_norm_frozen", TORCH_BOX(&O::batch_norm_frozen));
  m.impl("batch_norm_backward", TORCH_BOX(&O::batch_norm_backward));
  m.impl("channel_stats", TORCH_BOX(&O::channel_stats));
  m.impl("normalize", TORCH_BOX(&O::normalize));
  m.impl("grad_sums", TORCH_BOX(&O::grad_sums));
  m.impl("input_grad", TORCH_BOX(&O::input_grad));
}

}  // namespace fastbn
