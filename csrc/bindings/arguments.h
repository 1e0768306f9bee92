// From tensors to what the launchers take: checks, dense memory in one format, layout, dtypes. A check that fails says
// what was expected and what was got, before anything is allocated or changed.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "bindings/memory.h"
#include "bindings/stable.h"
#include "math/activation.h"
#include "math/layout.h"
#include "math/types.h"

namespace fastbn {

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType type);

// float32, float64, bfloat16 or float16.
DType dtype_of(const char* op, const char* name, const Tensor& tensor);

// Input-shaped tensors of one op: the first one sets shape, dtype, device and format, the others must follow.
class Operands {
 public:
  Operands(const char* op, const Tensor& input);

  const char* op() const { return op_; }
  const Tensor& input() const { return input_; }
  const Layout& layout() const { return layout_; }
  DType dtype() const { return dtype_; }

  // Dense in the input's format; a copy where the caller's is not.
  Tensor dense(const char* name, const Tensor& tensor) const;
  OptionalTensor dense(const char* name, const OptionalTensor& tensor) const;

  // The tensor itself where it is contiguous, else a copy.
  Tensor contiguous(const char* name, const Tensor& tensor) const;
  OptionalTensor contiguous(const char* name, const OptionalTensor& tensor) const;

  // A parameter or running statistic of shape [C]: the dtype of the input, or float32 beside a half type; all alike.
  ChannelVector channel_vector(const char* name, const OptionalTensor& tensor);

  // Statistics and sums: float64 of shape [size].
  double* float64_vector(const char* name, const Tensor& tensor, int64_t size) const;
  double* channel_float64(const char* name, const Tensor& tensor) const {
    return float64_vector(name, tensor, layout_.channels);
  }

  // The number of batches: int64, one element, on the input's device.
  int64_t* counter(const char* name, const OptionalTensor& tensor) const;

  // Takes format and layout from the mask, which a forward wrote: between it and backward a hook on saved tensors may
  // have changed the strides of the input.
  void follow_mask(const OptionalTensor& tensor);
  const uint8_t* mask(const OptionalTensor& tensor) const;
  Activation activation(int64_t index) const;

  Tensor empty_like_input() const;
  Tensor empty_mask() const;
  Tensor empty(int64_t size, ScalarType type) const;
  Tensor nothing(ScalarType type) const { return empty(0, type); }

 private:
  Tensor make_dense(const char* name, const Tensor& tensor) const;
  void check_device(const char* name, const Tensor& tensor) const;
  // Of a mask: [outer, ceil(channels / 8)] where channels are innermost, else [outer, channels, ceil(inner / 8)], so
  // that the number of dimensions tells which. Returns it.
  int64_t mask_sizes(int64_t (&sizes)[3]) const;
  void check_storage(const char* name, const Tensor& tensor, int64_t extent, int64_t element_size) const;

  const char* op_;
  MemoryFormat format_;
  Layout layout_;
  DType dtype_;
  Tensor input_;
  const char* first_vector_ = nullptr;  // the parameter that the others' dtype must match
  ScalarType vector_type_ = ScalarType::Float;
};

}  // namespace fastbn
