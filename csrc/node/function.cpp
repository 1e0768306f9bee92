#include "node/function.h"

#include <torch/csrc/utils/pybind.h>

#include <bit>
#include <stdexcept>
#include <utility>
#include <vector>

#include "math/activation.h"
#include "math/layout.h"
#include "node/usual.h"

namespace fastbn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What backward knows beside the saved tensors.
struct Saved {
  bool has_input, has_mask, has_weight, has_bias, has_residual;  // whether they were saved
  bool took_residual, took_weight, took_bias;  // whether they took part at all, which numbers the edges of the graph
  bool batch_stats, is_contiguous, is_channels_last;
  int64_t activation, bias_dtype;  // bias_dtype: -1 without bias
  std::optional<double> param;
  double eps;
  std::vector<int64_t> strides;  // of the input; empty if it is contiguous

  // Writes one list of integers, which torch's compiled autograd can read too.
  void write(AutogradContext* context) const {
    int64_t flags = 0, bit = 1;
    for (const bool flag : {has_input, has_mask, has_weight, has_bias, has_residual, took_residual, took_weight,
                            took_bias, batch_stats, is_contiguous, is_channels_last, param.has_value()}) {
      flags |= flag ? bit : 0;
      bit <<= 1;
    }
    c10::List<int64_t> list;
    list.reserve(5 + strides.size());
    for (const int64_t value :
         {flags, activation, bias_dtype, std::bit_cast<int64_t>(param.value_or(0)), std::bit_cast<int64_t>(eps)})
      list.push_back(value);
    for (const int64_t stride : strides) list.push_back(stride);
    context->saved_data["options"] = std::move(list);
  }

  static Saved read(AutogradContext* context) {
    const c10::List<int64_t> list = context->saved_data["options"].toIntList();
    int64_t flags = list.get(0);
    const auto flag = [&] { return bool(std::exchange(flags, flags >> 1) & 1); };
    Saved saved{flag(), flag(), flag(), flag(), flag(), flag(), flag(), flag(), flag(), flag(), flag()};
    saved.activation = list.get(1);
    saved.bias_dtype = list.get(2);
    if (flag()) saved.param = std::bit_cast<double>(list.get(3));
    saved.eps = std::bit_cast<double>(list.get(4));
    for (size_t i = 5; i < list.size(); ++i) saved.strides.push_back(list.get(i));
    return saved;
  }
};

OptionalTensor take(const variable_list& tensors, size_t& next, bool is_there) {
  return is_there ? OptionalTensor(tensors[next++]) : std::nullopt;
}

at::MemoryFormat format_of(const Saved& saved, int64_t dim) {
  if (!saved.is_channels_last) return at::MemoryFormat::Contiguous;
  return dim == 5 ? at::MemoryFormat::ChannelsLast3d : at::MemoryFormat::ChannelsLast;
}

// Returns what the backward of the Python function returns, for whatever is rare: a graph that is differentiated again,
// hooks on saved tensors that have changed strides, a batch of gradients.
variable_list python_backward(const Saved& saved, const variable_list& tensors, Needs needs, const Tensor& grad_out) {
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object function = pybind11::module_::import("fastbn.autograd.batch_norm").attr("gradients_of_node");
  const pybind11::object none = pybind11::none();
  const pybind11::object result = function(
      tensors, std::tuple(saved.has_input, saved.has_mask, saved.has_weight, saved.has_bias, saved.has_residual),
      saved.is_contiguous ? none : pybind11::tuple(pybind11::cast(saved.strides)),
      pybind11::cast(format_of(saved, grad_out.dim())),
      saved.bias_dtype < 0 ? none : pybind11::cast(at::ScalarType(saved.bias_dtype)), saved.batch_stats, saved.eps,
      saved.activation, saved.param, std::tuple(needs.input, needs.residual, needs.weight, needs.bias), grad_out);
  variable_list grads;
  for (const pybind11::handle grad : result) grads.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
  grads.emplace_back();
  return grads;
}

// Raises torch's own exception if `error`, which an op raised, stands for one (fastbn/ops/errors.py).
void raise_of_torch(const std::exception& error) {
  const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
  const pybind11::gil_scoped_acquire gil;
  const pybind11::object exception =
      pybind11::handle(PyExc_RuntimeError)(of_torch ? of_torch->what_without_backtrace() : error.what());
  pybind11::module_::import("fastbn.ops.errors").attr("raise_of_torch")(exception);
}

// Returns whether a bit per element is kept for backward in place of the residual (saves_mask of
// fastbn/backends/native.py).
bool is_masked(const Call& call, MemoryFormat format) {
  if (!call.residual || !is_piecewise_linear(Activation(call.activation))) return false;
  return call.input.is_cpu() || layout_of(call.input.sizes().data(), call.input.dim(), format).run() % 8 == 0;
}

FourTensors forward_op(const Call& call, bool save_mask) {
  try {
    return call.training ? train(call, save_mask) : frozen(call, save_mask);
  } catch (const std::exception&) {
    throw Refused();
  }
}

}  // namespace

Tensor BatchNormFunction::forward(AutogradContext* context, const Tensor& input, const OptionalTensor& residual,
                                  const OptionalTensor& weight, const OptionalTensor& bias, const Call& call) {
  const MemoryFormat format = suggest_memory_format(input.sizes().data(), input.strides().data(), input.dim());
  const bool masked = is_masked(call, format);
  auto [output, mean, inv_std, mask] = forward_op(call, masked);
  const bool recomputes = call.activation != 0 && !masked;
  // Frozen statistics need the input only for the gradient of weight, or to find the activation's derivative.
  Saved saved{.has_input = call.training || recomputes || (weight && weight->requires_grad()),
              .has_mask = masked,
              .has_weight = weight.has_value(),
              .has_bias = recomputes && bias,
              .has_residual = recomputes && residual,
              .took_residual = residual.has_value(),
              .took_weight = weight.has_value(),
              .took_bias = bias.has_value(),
              .batch_stats = call.training,
              .is_contiguous = input.is_contiguous(),
              .is_channels_last = format == MemoryFormat::channels_last,
              .activation = call.activation,
              .bias_dtype = bias ? int64_t(bias->scalar_type()) : -1,
              .param = call.param,
              .eps = call.eps,
              .strides = {}};
  if (!saved.is_contiguous) saved.strides = input.strides().vec();
  saved.write(context);
  variable_list tensors;
  tensors.reserve(7);
  tensors.push_back(std::move(mean));
  tensors.push_back(std::move(inv_std));
  if (saved.has_weight) tensors.push_back(*weight);
  if (saved.has_input) tensors.push_back(input);
  if (saved.has_mask) tensors.push_back(std::move(mask));
  if (saved.has_bias) tensors.push_back(*bias);
  if (saved.has_residual) tensors.push_back(*residual);
  context->save_for_backward(std::move(tensors));
  return output;
}

variable_list BatchNormFunction::backward(AutogradContext* context, const variable_list& grads) {
  const Saved saved = Saved::read(context);
  const Tensor& grad_out = grads[0];
  const variable_list tensors = context->get_saved_variables();
  size_t edge = 0;
  Needs needs;
  needs.input = context->needs_input_grad(edge++);
  needs.residual = saved.took_residual && context->needs_input_grad(edge++);
  needs.weight = saved.took_weight && context->needs_input_grad(edge++);
  needs.bias = saved.took_bias && context->needs_input_grad(edge++);

  size_t next = 0;
  const Tensor &mean = tensors[next++], &inv_std = tensors[next++];
  const OptionalTensor weight = take(tensors, next, saved.has_weight);
  const OptionalTensor saved_input = take(tensors, next, saved.has_input);
  const OptionalTensor mask = take(tensors, next, saved.has_mask);
  OptionalTensor bias = take(tensors, next, saved.has_bias);
  const OptionalTensor residual = take(tensors, next, saved.has_residual);

  const bool as_in_forward = saved_input
                                 ? (saved.is_contiguous ? saved_input->is_contiguous()
                                                        : saved_input->strides() == at::IntArrayRef(saved.strides))
                                 : is_plain(grad_out.key_set());
  if (at::GradMode::is_enabled() || !as_in_forward) return python_backward(saved, tensors, needs, grad_out);

  // Of an input that was not saved only shape, dtype and format matter.
  const Tensor input = saved_input ? *saved_input : grad_out.contiguous(format_of(saved, grad_out.dim()));
  if (!weight && !bias && saved.bias_dtype >= 0)  // only its dtype matters: its gradient's
    bias = mean.new_empty(mean.sizes(), at::ScalarType(saved.bias_dtype));
  // Without an activation the gradient of the residual is grad_out itself.
  Needs of_op = needs;
  of_op.residual &= saved.activation != 0;
  try {
    auto [grad_input, grad_weight, grad_bias, grad_residual] =
        fastbn::backward({grad_out, input, residual, mask, weight, bias, mean, inv_std, saved.batch_stats,
                          saved.activation, of_op, saved.param});
    if (saved.activation == 0) grad_residual = grad_out;
    return {needs.input ? std::move(grad_input) : Tensor(), needs.residual ? std::move(grad_residual) : Tensor(),
            needs.weight ? std::move(grad_weight) : Tensor(), needs.bias ? std::move(grad_bias) : Tensor(), Tensor()};
  } catch (const std::exception& error) {
    raise_of_torch(error);
    throw;
  }
}

}  // namespace fastbn
