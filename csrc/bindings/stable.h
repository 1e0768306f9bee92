// The part of LibTorch's stable ABI that the bindings use. The build sets TORCH_TARGET_VERSION to 2.10, so that one
// binary serves every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifndef FASTBN_NAMESPACE
#define FASTBN_NAMESPACE fastbn
#endif

namespace fastbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace fastbn
