// bindings/memory.h by torch's C++ interface, whose errors pass as they are.
#include "bindings/memory.h"

#include <ATen/Functions.h>

#include <string>

namespace fastbn {

std::string device_name(const Tensor& tensor) { return tensor.device().str(); }
int32_t device_index(const Tensor& tensor) { return int32_t(tensor.get_device()); }

int64_t storage_offset(const Tensor& tensor) { return tensor.storage_offset(); }
int64_t storage_bytes(const Tensor& tensor) { return int64_t(tensor.storage().nbytes()); }
int64_t size_of(ScalarType type) { return int64_t(c10::elementSize(type)); }

Tensor dense_copy(const Tensor& tensor, torch::headeronly::MemoryFormat format) { return tensor.contiguous(format); }

Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type,
                 torch::headeronly::MemoryFormat format) {
  return at::empty({sizes, size_t(dim)}, like.options().dtype(type), format);
}

Tensor nothing(const Tensor&, ScalarType) { return {}; }

void* data_of(const Tensor& tensor) { return tensor.data_ptr(); }

}  // namespace fastbn
