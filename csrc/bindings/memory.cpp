#include "bindings/memory.h"

#include <torch/csrc/stable/ops.h>

#include <stdexcept>

#include "bindings/allocate_in_python.h"
#include "math/layout.h"

// Returns the text of the last error that the C interface caught in this thread. The symbol is null before torch 2.13,
// which added it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastbn {
namespace {

using Format = torch::headeronly::MemoryFormat;

int32_t shim_type(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

[[noreturn]] void fail_with_text_of_torch(const std::runtime_error& error) {
  const auto get_text = torch_exception_get_what_without_backtrace;
  const std::string text = get_text ? get_text() : "";
  throw std::runtime_error(text.empty() ? error.what() : text);
}

// Calls `allocate`. If that fails, throws with the text of torch's error.
template <class Allocate>
Tensor allocate_as_torch(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
  }
  // Everything that the op has allocated so far is still held, so torch meets the same conditions.
  if (const AllocateInPython repeat = allocate_in_python) {
    const std::string error = repeat(sizes, dim, torch::headeronly::toString(type), device_name(like));
    if (!error.empty()) throw std::runtime_error(error);
  }
  try {
    return allocate();
  } catch (const std::runtime_error& again) {
    fail_with_text_of_torch(again);
  }
}

// Returns a view of a new contiguous tensor as dense in channels_last: new_empty has no argument for the format.
Tensor in_channels_last(const Tensor& fresh) {
  const auto sizes = fresh.sizes();
  const int64_t dim = fresh.dim();
  int64_t strides[5], stride = sizes[1];
  strides[1] = 1;
  for (int64_t k = 1; k < dim; ++k) {
    const int64_t d = channels_last_dim(k, dim);
    strides[d] = stride;
    stride *= sizes[d];
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(fresh.get(), dim, sizes.data(), strides, 0, &handle));
  return Tensor(handle);
}

}  // namespace

std::atomic<AllocateInPython> allocate_in_python = nullptr;

std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "device ") + std::to_string(int(device.index()));
}

int32_t device_index(const Tensor& tensor) { return tensor.get_device_index(); }

int64_t storage_offset(const Tensor& tensor) {
  int64_t offset;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(tensor.get(), &offset));
  return offset;
}

int64_t storage_bytes(const Tensor& tensor) {
  int64_t bytes;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  return bytes;
}

int64_t size_of(ScalarType type) { return int64_t(aoti_torch_dtype_element_size(shim_type(type))); }

Tensor dense_copy(const Tensor& tensor, Format format) {
  return allocate_as_torch(tensor, tensor.sizes().data(), tensor.dim(), tensor.scalar_type(),
                           [&] { return torch::stable::contiguous(tensor, format); });
}

// Calls aten::new_empty by its C function. torch::stable::empty, which looks the op up by name and boxes its arguments
// on the heap, takes twice as long (0.65 against 0.32 us).
Tensor new_empty(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type, Format format) {
  const Tensor fresh = allocate_as_torch(like, sizes, dim, type, [&] {
    int32_t dtype = shim_type(type);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_aten_new_empty(like.get(), sizes, dim, &dtype, nullptr, nullptr, 0, nullptr, &handle));
    return Tensor(handle);
  });
  return format == Format::Contiguous ? fresh : in_channels_last(fresh);
}

// Returns an empty tensor, since a result of an op has to be one. This function bypasses the dispatcher, and so torch's
// deterministic mode, which would fill memory; here there is none.
Tensor nothing(const Tensor& like, ScalarType type) {
  const int64_t size = 0, stride = 1;
  int32_t device_type;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &size, &stride, shim_type(type), device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

void* data_of(const Tensor& tensor) {
  try {
    return tensor.data_ptr();
  } catch (const std::runtime_error& error) {
    fail_with_text_of_torch(error);
  }
}

}  // namespace fastbn
