// What the bindings ask of torch beside a tensor's members: allocation and storage. A failure carries the text of
// torch's own error. memory.cpp asks its C interface, csrc/node/memory.cpp its C++ interface.
#pragma once

#include <cstdint>
#include <string>

#include "bindings/tensor.h"

namespace fastbn {

// Returns "cpu", "cuda:0" and so on.
std::string device_name(const Tensor& tensor);
// Returns the index of a tensor's GPU, or -1.
int32_t device_index(const Tensor& tensor);

// Return the offset of the first element in the storage, in elements, the storage's size in bytes, and a dtype's size.
int64_t storage_offset(const Tensor& tensor);
int64_t storage_bytes(const Tensor& tensor);
int64_t size_of(ScalarType type);

// Returns a copy that is dense in `format`.
Tensor dense_copy(const Tensor& tensor, torch::headeronly::MemoryFormat format);

// Returns an uninitialized tensor on the device of `like`, dense in `format`.
Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type,
                 torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous);

// Returns what stands for a result that was not asked for.
Tensor nothing(const Tensor& like, ScalarType type);

// Returns the address of the first element.
void* data_of(const Tensor& tensor);

}  // namespace fastbn
