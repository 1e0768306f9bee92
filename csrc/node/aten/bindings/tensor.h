// The tensors of torch's C++ interface, whose members are inline: csrc/node compiles the bindings' checks with them.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace fastbn {

using at::Tensor;
using torch::headeronly::ScalarType;
using OptionalTensor = std::optional<Tensor>;

}  // namespace fastbn
