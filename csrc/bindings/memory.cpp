#include "bindings/memory.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "bindings/arguments.h"

// Returns the text of the last error that the C interface caught in this thread. The symbol is null before torch 2.13,
// which added it.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fastbn {
namespace {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

[[noreturn]] void fail_with_text_of_torch(const std::runtime_error& error) {
  const auto get_text = torch_exception_get_what_without_backtrace;
  const std::string text = get_text ? get_text() : "";
  throw std::runtime_error(text.empty() ? error.what() : text);
}

// Repeats an allocation from Python, where torch raises its own exception, which fastbn.ops.errors keeps for the caller
// of the op. Returns the text of that exception, or an empty string if the allocation now succeeds.
std::string allocate_in_python(const Tensor& like, Sizes sizes, ScalarType type) {
  const pybind11::gil_scoped_acquire gil;
  try {
    const auto allocate = pybind11::module_::import("fastbn.ops.errors").attr("allocate");
    const std::vector<int64_t> shape(sizes.begin(), sizes.end());
    return allocate(shape, name_of(type), device_name(like)).cast<std::string>();
  } catch (const pybind11::error_already_set& error) {
    return error.what();
  }
}

// Calls `allocate`. If that fails, throws with the text of torch's error.
template <class Allocate>
Tensor allocate_as_torch(const Tensor& like, Sizes sizes, ScalarType type, Allocate allocate) {
  try {
    return allocate();
  } catch (const std::runtime_error&) {
  }
  // Everything that the op has allocated so far is still held, so torch meets the same conditions.
  const std::string error = allocate_in_python(like, sizes, type);
  if (!error.empty()) throw std::runtime_error(error);
  try {
    return allocate();
  } catch (const std::runtime_error& again) {
    fail_with_text_of_torch(again);
  }
}

}  // namespace

std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "device ") + std::to_string(int(device.index()));
}

int32_t shim_type(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

Tensor dense_copy(const Tensor& tensor, torch::headeronly::MemoryFormat format) {
  return allocate_as_torch(tensor, tensor.sizes(), tensor.scalar_type(),
                           [&] { return torch::stable::contiguous(tensor, format); });
}

// Calls aten::new_empty by its C function. torch::stable::empty, which looks the op up by name and boxes its arguments
// on the heap, takes twice as long (0.65 against 0.32 us).
Tensor new_empty(const Tensor& like, Sizes sizes, ScalarType type) {
  return allocate_as_torch(like, sizes, type, [&] {
    int32_t dtype = shim_type(type);
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(), int64_t(sizes.size()), &dtype, nullptr,
                                                     nullptr, 0, nullptr, &handle));
    return Tensor(handle);
  });
}

void* data_of(const Tensor& tensor) {
  try {
    return tensor.data_ptr();
  } catch (const std::runtime_error& error) {
    fail_with_text_of_torch(error);
  }
}

}  // namespace fastbn
