// Converts tensors to the arguments of launchers: checks, dense memory in one format, layout, dtypes. The message of a
// failed check says what was expected and what was got; nothing has been allocated or changed by then.
#pragma once

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "bindings/launchers.h"
#include "bindings/memory.h"
#include "bindings/tensor.h"
#include "math/activation.h"
#include "math/layout.h"
#include "math/types.h"

namespace fastbn {

// Throws an error whose message is the op's name and `parts`.
template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream message;
  message << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType type);

// Returns the tensor's dtype, or fails unless it is float32, float64, bfloat16 or float16.
DType dtype_of(const char* op, const char* name, const Tensor& tensor);

// The tensor arguments of one op. The input determines shape, dtype, device and format, which the others must match.
class Operands final : public Site {
 public:
  Operands(const char* op, const Tensor& input);

  const char* op() const override { return op_; }
  int32_t device() const override { return device_index(input_); }
  void* workspace(int64_t bytes) override;

  const Tensor& input() const { return input_; }
  const Layout& layout() const { return layout_; }
  DType dtype() const { return dtype_; }

  // Returns a checked tensor that is dense in the input's format: the caller's, or a copy.
  Tensor dense(const char* name, const Tensor& tensor) const;
  OptionalTensor dense(const char* name, const OptionalTensor& tensor) const;

  // Returns the tensor itself if it is contiguous, else a copy.
  Tensor contiguous(const char* name, const Tensor& tensor) const;
  OptionalTensor contiguous(const char* name, const OptionalTensor& tensor) const;

  // Returns a parameter or running statistic of shape [C]. Its dtype is the input's, or float32 with an input of a half
  // type, and the same for all of them.
  ChannelVector channel_vector(const char* name, const OptionalTensor& tensor);

  // Returns statistics or sums: float64 of shape [size].
  double* float64_vector(const char* name, const Tensor& tensor, int64_t size) const;
  double* channel_float64(const char* name, const Tensor& tensor) const {
    return float64_vector(name, tensor, layout_.channels);
  }

  // Returns the number of batches: int64, one element, on the input's device.
  int64_t* counter(const char* name, const OptionalTensor& tensor) const;

  // Takes format and layout from the mask, which forward wrote. Between forward and backward, a hook on saved tensors
  // may have changed the input's strides.
  void follow_mask(const OptionalTensor& tensor);
  const uint8_t* mask(const OptionalTensor& tensor) const;
  Activation activation(int64_t index) const;
  // Returns the parameter of an activation, torch's default where none is given.
  double activation_param(Activation activation, std::optional<double> param) const;

  Tensor empty_like_input() const;
  Tensor empty_mask() const;
  Tensor empty(int64_t size, ScalarType type) const;
  Tensor nothing(ScalarType type) const { return fastbn::nothing(input_, type); }

 private:
  Tensor make_dense(const char* name, const Tensor& tensor) const;
  void check_device(const char* name, const Tensor& tensor) const;
  // Sets the shape of a mask and returns its number of dimensions: [outer, ceil(channels / 8)] if channels are
  // innermost, else [outer, channels, ceil(inner / 8)], so that the number of dimensions identifies the layout.
  int64_t mask_sizes(int64_t (&sizes)[3]) const;
  void check_storage(const char* name, const Tensor& tensor, int64_t extent, int64_t element_size) const;

  const char* op_;
  MemoryFormat format_;
  Layout layout_;
  DType dtype_;
  Tensor input_;
  OptionalTensor workspace_;
  const char* first_vector_ = nullptr;  // name of the parameter whose dtype the others must match
  ScalarType vector_type_ = ScalarType::Float;
};

}  // namespace fastbn
