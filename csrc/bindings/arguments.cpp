#include "bindings/arguments.h"

namespace fastbn {
namespace {

torch::headeronly::MemoryFormat torch_format(MemoryFormat format, int64_t dim) {
  using Torch = torch::headeronly::MemoryFormat;
  if (format == MemoryFormat::contiguous) return Torch::Contiguous;
  return dim == 5 ? Torch::ChannelsLast3d : Torch::ChannelsLast;
}

bool same_sizes(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

}  // namespace

std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default:
      fail(op, "expected ", name, " of dtype Float, Double, BFloat16 or Half, got ", name_of(tensor.scalar_type()));
  }
}

Operands::Operands(const char* op, const Tensor& input) : op_(op), dtype_(dtype_of(op, "input", input)), input_(input) {
  const int64_t dim = input.dim();
  if (dim < 2) fail(op, "expected input of at least 2 dimensions, got shape ", shape_of(input));
  if (input.size(1) == 0) fail(op, "expected input of at least one channel, got shape ", shape_of(input));
  format_ = suggest_memory_format(input.sizes().data(), input.strides().data(), dim);
  layout_ = layout_of(input.sizes().data(), dim, format_);
  input_ = make_dense("input", input);
}

Tensor Operands::make_dense(const char* name, const Tensor& tensor) const {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t dim = int64_t(sizes.size());
  check_storage(name, tensor, extent_of(sizes.data(), strides.data(), dim), element_size(dtype_));
  if (is_dense(sizes.data(), strides.data(), dim, format_)) return tensor;
  return dense_copy(tensor, torch_format(format_, dim));
}

Tensor Operands::contiguous(const char* name, const Tensor& tensor) const {
  if (tensor.is_contiguous()) return tensor;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const int64_t extent = extent_of(sizes.data(), strides.data(), int64_t(sizes.size()));
  check_storage(name, tensor, extent, size_of(tensor.scalar_type()));
  return dense_copy(tensor, torch::headeronly::MemoryFormat::Contiguous);
}

OptionalTensor Operands::contiguous(const char* name, const OptionalTensor& tensor) const {
  if (!tensor) return std::nullopt;
  return contiguous(name, *tensor);
}

// Fails if a tensor's storage was freed or truncated, as FSDP does with parameters. The address would be null, which
// kernels take for an absent argument, or they would read past the end. `extent` is the number of elements from the
// first to the last.
void Operands::check_storage(const char* name, const Tensor& tensor, int64_t extent, int64_t element_size) const {
  const int64_t size = storage_bytes(tensor);
  const int64_t expected = extent ? (storage_offset(tensor) + extent) * element_size : 0;
  if (size < expected)
    fail(op_, "expected ", name, " with a storage of at least ", expected, " bytes, got ", size,
         ". The tensor has a non-zero number of elements, but its data is not allocated yet.");
}

void Operands::check_device(const char* name, const Tensor& tensor) const {
  if (tensor.device() != input_.device())
    fail(op_, "expected ", name, " on ", device_name(input_), ", got ", device_name(tensor));
}

Tensor Operands::dense(const char* name, const Tensor& tensor) const {
  check_device(name, tensor);
  if (!same_sizes(tensor, input_))
    fail(op_, "expected ", name, " of shape ", shape_of(input_), ", got ", shape_of(tensor));
  if (tensor.scalar_type() != input_.scalar_type())
    fail(op_, "expected ", name, " of dtype ", name_of(input_.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  return make_dense(name, tensor);
}

OptionalTensor Operands::dense(const char* name, const OptionalTensor& tensor) const {
  if (!tensor) return std::nullopt;
  return dense(name, *tensor);
}

ChannelVector Operands::channel_vector(const char* name, const OptionalTensor& tensor) {
  if (!tensor) return {};
  check_device(name, *tensor);
  if (tensor->dim() != 1 || tensor->size(0) != layout_.channels)
    fail(op_, "expected ", name, " of shape [", layout_.channels, "], got ", shape_of(*tensor));
  const ScalarType type = tensor->scalar_type();
  const bool half_input = dtype_ == DType::bfloat16 || dtype_ == DType::float16;
  if (type != input_.scalar_type() && !(half_input && type == ScalarType::Float))
    fail(op_, "expected ", name, " of dtype ", name_of(input_.scalar_type()), half_input ? " or Float" : "", ", got ",
         name_of(type));
  if (first_vector_ && type != vector_type_)
    fail(op_, "expected ", name, " of the dtype of ", first_vector_, ", ", name_of(vector_type_), ", got ",
         name_of(type));
  if (!tensor->is_contiguous()) fail(op_, "expected contiguous ", name, ", got stride ", tensor->stride(0));
  if (!first_vector_) {
    first_vector_ = name;
    vector_type_ = type;
  }
  const DType dtype = dtype_of(op_, name, *tensor);
  check_storage(name, *tensor, layout_.channels, element_size(dtype));
  return {data_of(*tensor), dtype};
}

double* Operands::float64_vector(const char* name, const Tensor& tensor, int64_t size) const {
  check_device(name, tensor);
  if (tensor.scalar_type() != ScalarType::Double || tensor.numel() != size || !tensor.is_contiguous())
    fail(op_, "expected contiguous ", name, " of dtype Double and shape [", size, "], got ",
         name_of(tensor.scalar_type()), " of shape ", shape_of(tensor));
  check_storage(name, tensor, size, sizeof(double));
  return static_cast<double*>(data_of(tensor));
}

int64_t* Operands::counter(const char* name, const OptionalTensor& tensor) const {
  if (!tensor) return nullptr;
  check_device(name, *tensor);
  if (tensor->scalar_type() != ScalarType::Long || tensor->numel() != 1)
    fail(op_, "expected ", name, " of dtype Long and one element, got ", name_of(tensor->scalar_type()), " of shape ",
         shape_of(*tensor));
  check_storage(name, *tensor, 1, sizeof(int64_t));
  return static_cast<int64_t*>(data_of(*tensor));
}

int64_t Operands::mask_sizes(int64_t (&sizes)[3]) const {
  const bool rows = layout_.channels_are_innermost();
  sizes[0] = layout_.outer;
  if (!rows) sizes[1] = layout_.channels;
  sizes[rows ? 1 : 2] = layout_.mask_bytes_per_run();
  return rows ? 2 : 3;
}

void Operands::follow_mask(const OptionalTensor& tensor) {
  if (!tensor) return;
  const bool rows = tensor->dim() == 2;
  if (rows == layout_.channels_are_innermost() || (rows && input_.dim() < 4)) return;
  format_ = rows ? MemoryFormat::channels_last : MemoryFormat::contiguous;
  layout_ = layout_of(input_.sizes().data(), input_.dim(), format_);
  input_ = make_dense("input", input_);
}

const uint8_t* Operands::mask(const OptionalTensor& tensor) const {
  if (!tensor) return nullptr;
  check_device("mask", *tensor);
  int64_t sizes[3];
  const int64_t dim = mask_sizes(sizes);
  bool fits = tensor->scalar_type() == ScalarType::Byte && tensor->dim() == dim && tensor->is_contiguous();
  for (int64_t d = 0; fits && d < dim; ++d) fits = tensor->size(d) == sizes[d];
  if (!fits) {
    std::string shape = "[" + std::to_string(sizes[0]);
    for (int64_t d = 1; d < dim; ++d) shape += ", " + std::to_string(sizes[d]);
    fail(op_, "expected contiguous mask of dtype Byte and shape ", shape, "], got ", name_of(tensor->scalar_type()),
         " of shape ", shape_of(*tensor));
  }
  check_storage("mask", *tensor, tensor->numel(), 1);
  return static_cast<const uint8_t*>(tensor->const_data_ptr());
}

Activation Operands::activation(int64_t index) const {
  if (index < 0 || index >= activation_count)
    fail(op_, "expected activation from 0 to ", activation_count - 1, ", got ", index);
  return Activation(index);
}

double Operands::activation_param(Activation activation, std::optional<double> param) const {
  with_activation(activation, [&](auto a) {
    if (param && !a.has_param) fail(op_, "expected no activation_param, which ", a.name, " has not, got ", *param);
  });
  return param.value_or(default_param_of(activation));
}

Tensor Operands::empty_like_input() const {
  return new_empty(input_, input_.sizes().data(), input_.dim(), input_.scalar_type(),
                   torch_format(format_, input_.dim()));
}

Tensor Operands::empty_mask() const {
  int64_t sizes[3];
  const int64_t dim = mask_sizes(sizes);
  return new_empty(input_, sizes, dim, ScalarType::Byte);
}

Tensor Operands::empty(int64_t size, ScalarType type) const { return new_empty(input_, &size, 1, type); }

void* Operands::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  workspace_ = empty(bytes, ScalarType::Byte);
  return workspace_->data_ptr();
}

}  // namespace fastbn
