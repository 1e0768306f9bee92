// The part of LibTorch's stable ABI that the bindings use. TORCH_TARGET_VERSION is 2.10, set by the build: one binary
// serves every torch from there on.
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
