// The function that bindings/memory.h calls to repeat an allocation in Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace fastbn {

// Calls fastbn.ops.errors.allocate, which keeps torch's own exception for the caller of the op.
inline std::string call_allocate(const int64_t* sizes, int64_t dim, const char* dtype, const std::string& device) {
  const pybind11::gil_scoped_acquire gil;
  try {
    const auto allocate = pybind11::module_::import("fastbn.ops.errors").attr("allocate");
    return allocate(std::vector<int64_t>(sizes, sizes + dim), dtype, device).cast<std::string>();
  } catch (const pybind11::error_already_set& error) {
    return error.what();
  }
}

}  // namespace fastbn
