#include "bindings/arguments.h"

namespace fastbn {
namespace {

torch::headeronly::MemoryFormat torch_format(MemoryFormat format, int64_t dim) {
  using Torch = torch::headeronly::MemoryFormat;
  if (format == MemoryFormat::contiguous) return Torch::Contiguous;
  return dim == 5 ? Torch::ChannelsLast3d : Torch::ChannelsLast;
}

Tensor make_dense(const Tensor& tensor, MemoryFormat format) {
  if (is_dense(tensor.sizes().data(), tensor.strides().data(), tensor.dim(), format)) return tensor;
  return torch::stable::contiguous(tensor, torch_format(format, tensor.dim()));
}

std::string device_name(const Tensor& tensor) {
  const auto device = tensor.device();
  if (device.is_cpu()) return "cpu";
  return (device.is_cuda() ? "cuda:" : "device ") + std::to_string(int(device.index()));
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
  input_ = make_dense(input, format_);
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
  return make_dense(tensor, format_);
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
  return {tensor->data_ptr(), dtype_of(op_, name, *tensor)};
}

double* Operands::float64_vector(const char* name, const Tensor& tensor, int64_t size) const {
  check_device(name, tensor);
  if (tensor.scalar_type() != ScalarType::Double || tensor.numel() != size || !tensor.is_contiguous())
    fail(op_, "expected contiguous ", name, " of dtype Double and shape [", size, "], got ",
         name_of(tensor.scalar_type()), " of shape ", shape_of(tensor));
  return static_cast<double*>(tensor.data_ptr());
}

int64_t* Operands::counter(const char* name, const OptionalTensor& tensor) const {
  if (!tensor) return nullptr;
  check_device(name, *tensor);
  if (tensor->scalar_type() != ScalarType::Long || tensor->numel() != 1)
    fail(op_, "expected ", name, " of dtype Long and one element, got ", name_of(tensor->scalar_type()), " of shape ",
         shape_of(*tensor));
  return static_cast<int64_t*>(tensor->data_ptr());
}

const uint8_t* Operands::mask(const OptionalTensor& tensor) const {
  if (!tensor) return nullptr;
  check_device("mask", *tensor);
  if (tensor->scalar_type() != ScalarType::Byte || tensor->dim() != 2 || tensor->size(0) != layout_.runs() ||
      tensor->size(1) != layout_.mask_bytes_per_run() || !tensor->is_contiguous())
    fail(op_, "expected contiguous mask of dtype Byte and shape [", layout_.runs(), ", ", layout_.mask_bytes_per_run(),
         "], got ", name_of(tensor->scalar_type()), " of shape ", shape_of(*tensor));
  return static_cast<const uint8_t*>(tensor->data_ptr());
}

Activation Operands::activation(int64_t index) const {
  if (index < 0 || index >= activation_count)
    fail(op_, "expected activation from 0 to ", activation_count - 1, ", got ", index);
  return Activation(index);
}

Tensor Operands::empty_like_input() const {
  return torch::stable::empty(input_.sizes(), input_.scalar_type(), std::nullopt, input_.device(), std::nullopt,
                              torch_format(format_, input_.dim()));
}

Tensor Operands::empty_mask() const {
  const int64_t sizes[] = {layout_.runs(), layout_.mask_bytes_per_run()};
  return torch::stable::empty({sizes, 2}, ScalarType::Byte, std::nullopt, input_.device());
}

Tensor Operands::empty(int64_t size, ScalarType type) const {
  return torch::stable::empty({&size, 1}, type, std::nullopt, input_.device());
}

}  // namespace fastbn
