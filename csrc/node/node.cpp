// The autograd node of the fused op in training, in C++: an accelerator of
// fastbn.autograd.batch_norm.BatchNormFunction, which defines what it does. A Python Function takes some 15 us per
// forward and backward more.
//
// This is the one file that uses torch's C++ interface beyond the stable ABI, so it serves exactly the torch that it
// was compiled with, and its module has that torch's version in its name. fastbn works without it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/extension.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastbn {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using OptionalTensor = std::optional<Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The ops batch_norm_train, batch_norm_eval and batch_norm_backward of csrc/bindings/schemas.cpp.
using Train = FourTensors(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                          const OptionalTensor& bias, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                          std::optional<double> momentum, double eps, int64_t activation, bool save_mask,
                          std::optional<double> activation_param);
using Eval = Tensor(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                    const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps,
                    int64_t activation, std::optional<double> activation_param);
using Backward = FourTensors(const Tensor& grad_out, const Tensor& input, const OptionalTensor& residual,
                             const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& mean, const Tensor& inv_std, bool batch_stats, int64_t activation,
                             bool need_input, bool need_weight, bool need_bias, bool need_residual,
                             std::optional<double> activation_param);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// What forward takes beside the operands that have a gradient.
struct Options {
  const OptionalTensor& running_mean;
  const OptionalTensor& running_var;
  const OptionalTensor& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  int64_t activation;
  bool save_mask;
  std::optional<double> param;
};

FourTensors train(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                  const OptionalTensor& bias, const Options& options) {
  static const auto op = find<Train>("fastbn::batch_norm_train");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, residual, weight, bias, options.running_mean, options.running_var, options.num_batches_tracked,
                 options.momentum, options.eps, options.activation, options.save_mask, options.param);
}

// What backward knows beside the saved tensors, in a form that torch's compiled autograd can read too.
struct Saved {
  bool has_weight, has_bias, has_mask, has_residual, is_contiguous;
  // Of the operands, whether they took part at all, which numbers the edges of the graph.
  bool took_residual, took_weight, took_bias;
  int64_t activation, bias_dtype;  // bias_dtype: -1 without bias
  std::optional<double> param;
  double eps;
  std::vector<int64_t> strides;  // of the input; empty if it is contiguous

  void write(AutogradContext* context) const {
    std::vector<int64_t> integers = {has_weight,  has_bias,  has_mask,   has_residual, is_contiguous,    took_residual,
                                     took_weight, took_bias, activation, bias_dtype,   param.has_value()};
    integers.insert(integers.end(), strides.begin(), strides.end());
    context->saved_data["integers"] = std::move(integers);
    context->saved_data["doubles"] = std::vector<double>{eps, param.value_or(0)};
  }

  static Saved read(AutogradContext* context) {
    const std::vector<int64_t> i = context->saved_data["integers"].toIntVector();
    const std::vector<double> d = context->saved_data["doubles"].toDoubleVector();
    return {bool(i[0]),
            bool(i[1]),
            bool(i[2]),
            bool(i[3]),
            bool(i[4]),
            bool(i[5]),
            bool(i[6]),
            bool(i[7]),
            i[8],
            i[9],
            i[10] ? std::optional<double>(d[1]) : std::nullopt,
            d[0],
            {i.begin() + 11, i.end()}};
  }
};
}  // namespace

struct BatchNormFunction : torch::autograd::Function<BatchNormFunction> {
  static constexpr bool is_traceable = true;

  static Tensor forward(AutogradContext* context, const Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias, const Options& options) {
    auto [output, mean, inv_std, mask] = train(input, residual, weight, bias, options);
    const bool recomputes = options.activation != 0 && !options.save_mask;
    Saved saved{weight.has_value(),
                recomputes && bias,
                options.save_mask,
                recomputes && residual,
                input.is_contiguous(),
                residual.has_value(),
                weight.has_value(),
                bias.has_value(),
                options.activation,
                bias ? int64_t(bias->scalar_type()) : -1,
                options.param,
                options.eps,
                {}};
    if (!saved.is_contiguous) saved.strides = input.strides().vec();
    saved.write(context);
    // The order of BatchNormFunction.
    variable_list tensors = {std::move(mean), std::move(inv_std)};
    if (saved.has_weight) tensors.push_back(*weight);
    tensors.push_back(input);
    if (saved.has_mask) tensors.push_back(std::move(mask));
    if (saved.has_bias) tensors.push_back(*bias);
    if (saved.has_residual) tensors.push_back(*residual);
    context->save_for_backward(std::move(tensors));
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    static const auto op = find<Backward>("fastbn::batch_norm_backward");
    const Saved saved = Saved::read(context);
    variable_list tensors = context->get_saved_variables();
    size_t edge = 0;
    const bool need_input = context->needs_input_grad(edge++);
    const bool need_residual = saved.took_residual && context->needs_input_grad(edge++);
    const bool need_weight = saved.took_weight && context->needs_input_grad(edge++);
    const bool need_bias = saved.took_bias && context->needs_input_grad(edge++);

    const Tensor& input = tensors[2 + saved.has_weight];
    const bool kept_strides =
        saved.is_contiguous ? input.is_contiguous() : input.strides() == at::IntArrayRef(saved.strides);
    if (at::GradMode::is_enabled() || !kept_strides)
      return python_backward(saved, tensors, {need_input, need_residual, need_weight, need_bias}, grads[0]);

    size_t next = 2;
    const OptionalTensor weight = take(tensors, next, saved.has_weight);
    ++next;
    const OptionalTensor mask = take(tensors, next, saved.has_mask);
    OptionalTensor bias = take(tensors, next, saved.has_bias);
    const OptionalTensor residual = take(tensors, next, saved.has_residual);
    const Tensor &mean = tensors[0], &inv_std = tensors[1];
    if (!weight && !bias && saved.bias_dtype >= 0)  // only its dtype matters: its gradient's
      bias = at::empty(mean.sizes(), mean.options().dtype(at::ScalarType(saved.bias_dtype)));
    // Without an activation the gradient of the residual is grad_out itself.
    const bool kernel_residual = need_residual && saved.activation != 0;
    try {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      auto [grad_input, grad_weight, grad_bias, grad_residual] =
          op.call(grads[0], input, residual, mask, weight, bias, mean, inv_std, true, saved.activation, need_input,
                  need_weight, need_bias, kernel_residual, saved.param);
      if (saved.activation == 0) grad_residual = grads[0];
      return {need_input ? grad_input : Tensor(), need_residual ? grad_residual : Tensor(),
              need_weight ? grad_weight : Tensor(), need_bias ? grad_bias : Tensor(), Tensor()};
    } catch (const std::exception& error) {
      raise_of_torch(error);
      throw;
    }
  }

 private:
  static OptionalTensor take(const variable_list& tensors, size_t& next, bool is_there) {
    return is_there ? OptionalTensor(tensors[next++]) : std::nullopt;
  }

  // The backward of BatchNormFunction: of a graph that is differentiated again, or after hooks on saved tensors that
  // have changed their strides.
  static variable_list python_backward(const Saved& saved, const variable_list& tensors, std::vector<bool> needs,
                                       const Tensor& grad_out) {
    const pybind11::gil_scoped_acquire gil;
    const pybind11::object function = pybind11::module_::import("fastbn.autograd.batch_norm").attr("gradients_of_node");
    const pybind11::object none = pybind11::none();
    const pybind11::object result =
        function(tensors, std::tuple(true, saved.has_mask, saved.has_weight, saved.has_bias, saved.has_residual),
                 saved.is_contiguous ? none : pybind11::tuple(pybind11::cast(saved.strides)),
                 saved.bias_dtype < 0 ? none : pybind11::cast(at::ScalarType(saved.bias_dtype)), saved.eps,
                 saved.activation, saved.param, needs, grad_out);
    variable_list grads;
    for (const pybind11::handle grad : result) grads.push_back(grad.is_none() ? Tensor() : grad.cast<Tensor>());
    grads.emplace_back();
    return grads;
  }

  // Raises torch's own exception if `error`, which an op raised, stands for one (fastbn/ops/errors.py).
  static void raise_of_torch(const std::exception& error) {
    const auto* const of_torch = dynamic_cast<const c10::Error*>(&error);
    const pybind11::gil_scoped_acquire gil;
    const pybind11::object exception =
        pybind11::handle(PyExc_RuntimeError)(of_torch ? of_torch->what_without_backtrace() : error.what());
    pybind11::module_::import("fastbn.ops.errors").attr("raise_of_torch")(exception);
  }
};

namespace {

bool is_recorded(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                 const OptionalTensor& bias) {
  const auto requires_grad = [](const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); };
  return at::GradMode::is_enabled() &&
         (input.requires_grad() || requires_grad(residual) || requires_grad(weight) || requires_grad(bias));
}

// The operands of a call in the order of fastbn.ops.dispatch.Call, without `training`.
Tensor batch_norm_train(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                        std::optional<double> momentum, double eps, int64_t activation, std::optional<double> param,
                        bool save_mask) {
  Options options{running_mean, running_var, num_batches_tracked, momentum, eps, activation, save_mask, param};
  if (is_recorded(input, residual, weight, bias))
    return BatchNormFunction::apply(input, residual, weight, bias, options);
  options.save_mask = false;
  return std::get<0>(train(input, residual, weight, bias, options));
}

// The same in evaluation, for calls that are not recorded.
Tensor batch_norm_eval(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var, double eps,
                       int64_t activation, std::optional<double> param) {
  static const auto op = find<Eval>("fastbn::batch_norm_eval");
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return op.call(input, residual, weight, bias, running_mean, running_var, eps, activation, param);
}

}  // namespace
}  // namespace fastbn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "The autograd node of the fused op in training, and evaluation, for one version of torch.";
  module.def("batch_norm_train", torch::wrap_pybind_function_no_gil(fastbn::batch_norm_train));
  module.def("batch_norm_eval", torch::wrap_pybind_function_no_gil(fastbn::batch_norm_eval));
}
