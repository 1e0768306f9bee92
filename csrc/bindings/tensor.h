// The tensors of the bindings: those of LibTorch's stable ABI, so that one binary serves every torch from 2.10 on. The
// build sets TORCH_TARGET_VERSION to 2.10. csrc/node compiles the same ops with the tensors of torch's C++ interface,
// by a header of this name.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastbn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

}  // namespace fastbn
