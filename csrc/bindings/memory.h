// Allocation by torch and access to its memory. A failure carries the text of torch's own error, which the C interface
// drops.
#pragma once

#include <string>

#include "bindings/stable.h"

namespace fastbn {

// Returns "cpu", "cuda:0" and so on.
std::string device_name(const Tensor& tensor);
// Returns the C interface's code of a dtype.
int32_t shim_type(ScalarType type);

// Returns a copy that is dense in `format`.
Tensor dense_copy(const Tensor& tensor, torch::headeronly::MemoryFormat format);

// Returns an uninitialized contiguous tensor on the device of `like`.
Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type);

// Returns the address of the first element.
void* data_of(const Tensor& tensor);

}  // namespace fastbn
