// The eight ops, written once over a backend: check, allocate, describe, launch. A Backend is made for a Site
// (launchers.h) and runs forward, channel_stats, backward and grad_sums on parameters.
#pragma once

#include <tuple>

#include "bindings/arguments.h"
#include "math/params.h"

namespace fastbn {

template <class Backend>
struct Ops {
  using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  using Two = std::tuple<Tensor, Tensor>;

  static Four batch_norm_train(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                               const OptionalTensor& bias, const OptionalTensor& running_mean,
                               const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                               std::optional<double> momentum, double eps, int64_t activation, bool save_mask,
                               std::optional<double> activation_param) {
    Operands operands("batch_norm_train", input);
    Forward forward(operands, residual, weight, bias, activation, activation_param);
    ForwardParams& params = forward.params;
    params.statistics = Statistics::batch;
    params.running_mean = operands.channel_vector("running_mean", running_mean);
    params.running_var = operands.channel_vector("running_var", running_var);
    params.num_batches_tracked = operands.counter("num_batches_tracked", num_batches_tracked);
    params.has_momentum = momentum.has_value();
    params.momentum = momentum.value_or(0);
    params.eps = eps;
    return launch_and_save(forward, save_mask);
  }

  static Tensor batch_norm_eval(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                                double eps, int64_t activation, std::optional<double> activation_param) {
    Operands operands("batch_norm_eval", input);
    Forward forward(operands, residual, weight, bias, activation, activation_param);
    forward.normalize_by(running_mean, running_var, eps);
    forward.allocate_output();
    Backend(operands).forward(forward.params);
    return forward.output;
  }

  static Four batch_norm_frozen(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                                const OptionalTensor& bias, const Tensor& running_mean, const Tensor& running_var,
                                double eps, int64_t activation, bool save_mask,
                                std::optional<double> activation_param) {
    Operands operands("batch_norm_frozen", input);
    Forward forward(operands, residual, weight, bias, activation, activation_param);
    forward.normalize_by(running_mean, running_var, eps);
    return launch_and_save(forward, save_mask);
  }

  static Two normalize(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& weight,
                       const OptionalTensor& bias, const Tensor& mean, const Tensor& inv_std, int64_t activation,
                       bool save_mask, std::optional<double> activation_param) {
    Operands operands("normalize", input);
    Forward forward(operands, residual, weight, bias, activation, activation_param);
    ForwardParams& params = forward.params;
    params.statistics = Statistics::given;
    params.mean = operands.channel_float64("mean", mean);
    params.inv_std = operands.channel_float64("inv_std", inv_std);
    forward.allocate_output();
    forward.allocate_mask(save_mask);
    Backend(operands).forward(params);
    return {forward.output, forward.mask};
  }

  static Two channel_stats(const Tensor& input) {
    Operands operands("channel_stats", input);
    const Tensor mean = operands.empty(operands.layout().channels, ScalarType::Double);
    const Tensor var = operands.empty(operands.layout().channels, ScalarType::Double);
    ForwardParams params;
    params.layout = operands.layout();
    params.dtype = operands.dtype();
    params.input = operands.input().const_data_ptr();
    params.mean = static_cast<double*>(mean.data_ptr());
    params.var = static_cast<double*>(var.data_ptr());
    Backend(operands).channel_stats(params);
    return {mean, var};
  }

  static Four batch_norm_backward(const Tensor& grad_out, const Tensor& input, const OptionalTensor& residual,
                                  const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                                  const Tensor& mean, const Tensor& inv_std, bool batch_stats, int64_t activation,
                                  bool need_input, bool need_weight, bool need_bias, bool need_residual,
                                  std::optional<double> activation_param) {
    Operands operands("batch_norm_backward", input);
    Backward backward(operands, grad_out, residual, mask, weight, bias, mean, inv_std, activation, activation_param);
    BackwardParams& params = backward.params;
    params.statistics = batch_stats ? Statistics::batch : Statistics::running;
    const ScalarType type = weight ? weight->scalar_type() : bias ? bias->scalar_type() : input.scalar_type();
    const int64_t channels = operands.layout().channels;
    const Tensor grad_weight = need_weight ? operands.empty(channels, type) : operands.nothing(type);
    const Tensor grad_bias = need_bias ? operands.empty(channels, type) : operands.nothing(type);
    if (need_weight) params.grad_weight = {grad_weight.data_ptr(), dtype_of(operands.op(), "weight", grad_weight)};
    if (need_bias) params.grad_bias = {grad_bias.data_ptr(), dtype_of(operands.op(), "bias", grad_bias)};
    const auto [grad_input, grad_residual] = backward.allocate(need_input, need_residual);
    Backend(operands).backward(params);
    return {grad_input, grad_weight, grad_bias, grad_residual};
  }

  static Two grad_sums(const Tensor& grad_out, const Tensor& input, const OptionalTensor& residual,
                       const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                       const Tensor& mean, const Tensor& inv_std, int64_t activation,
                       std::optional<double> activation_param) {
    Operands operands("grad_sums", input);
    Backward backward(operands, grad_out, residual, mask, weight, bias, mean, inv_std, activation, activation_param);
    const Tensor sum_grad = operands.empty(operands.layout().channels, ScalarType::Double);
    const Tensor sum_grad_xhat = operands.empty(operands.layout().channels, ScalarType::Double);
    backward.params.sum_grad = static_cast<double*>(sum_grad.data_ptr());
    backward.params.sum_grad_xhat = static_cast<double*>(sum_grad_xhat.data_ptr());
    Backend(operands).grad_sums(backward.params);
    return {sum_grad, sum_grad_xhat};
  }

  static Two input_grad(const Tensor& grad_out, const Tensor& input, const OptionalTensor& residual,
                        const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias,
                        const Tensor& mean, const Tensor& inv_std, const OptionalTensor& sum_grad,
                        const OptionalTensor& sum_grad_xhat, const OptionalTensor& count, int64_t activation,
                        bool need_residual, std::optional<double> activation_param) {
    Operands operands("input_grad", input);
    Backward backward(operands, grad_out, residual, mask, weight, bias, mean, inv_std, activation, activation_param);
    BackwardParams& params = backward.params;
    const bool frozen = !sum_grad && !sum_grad_xhat && !count;
    if (!frozen && !(sum_grad && sum_grad_xhat && count))
      fail(operands.op(), "expected all of sum_grad, sum_grad_xhat and count, or none, got some");
    params.statistics = frozen ? Statistics::running : Statistics::given;
    if (!frozen) {
      params.sum_grad = operands.channel_float64("sum_grad", *sum_grad);
      params.sum_grad_xhat = operands.channel_float64("sum_grad_xhat", *sum_grad_xhat);
      params.count = operands.float64_vector("count", *count, 1);
    }
    const auto [grad_input, grad_residual] = backward.allocate(true, need_residual);
    Backend(operands).backward(params);
    return {grad_input, grad_residual};
  }

 private:
  // The common part of the forward ops. It owns what the pointers of `params` point to.
  struct Forward {
    Operands& operands;
    OptionalTensor residual;
    Tensor output, mask;
    ForwardParams params;

    Forward(Operands& operands, const OptionalTensor& residual_argument, const OptionalTensor& weight,
            const OptionalTensor& bias, int64_t activation, std::optional<double> activation_param)
        : operands(operands), residual(operands.dense("residual", residual_argument)) {
      params.layout = operands.layout();
      params.dtype = operands.dtype();
      params.activation = operands.activation(activation);
      params.activation_param = ActivationParam(operands.activation_param(params.activation, activation_param));
      params.weight = operands.channel_vector("weight", weight);
      params.bias = operands.channel_vector("bias", bias);
      params.input = operands.input().const_data_ptr();
      params.residual = residual ? residual->const_data_ptr() : nullptr;
    }

    void normalize_by(const Tensor& running_mean, const Tensor& running_var, double eps) {
      params.statistics = Statistics::running;
      params.running_mean = operands.channel_vector("running_mean", running_mean);
      params.running_var = operands.channel_vector("running_var", running_var);
      params.eps = eps;
    }

    void allocate_output() {
      output = operands.empty_like_input();
      params.output = output.data_ptr();
    }

    void allocate_mask(bool save_mask) {
      const bool masked = save_mask && is_piecewise_linear(params.activation);
      mask = masked ? operands.empty_mask() : operands.nothing(ScalarType::Byte);
      if (masked) params.mask = static_cast<uint8_t*>(mask.data_ptr());
    }
  };

  // Runs a forward op whose results backward needs.
  static Four launch_and_save(Forward& forward, bool save_mask) {
    Operands& operands = forward.operands;
    ForwardParams& params = forward.params;
    forward.allocate_output();
    const Tensor mean = operands.empty(params.layout.channels, ScalarType::Double);
    const Tensor inv_std = operands.empty(params.layout.channels, ScalarType::Double);
    params.mean = static_cast<double*>(mean.data_ptr());
    params.inv_std = static_cast<double*>(inv_std.data_ptr());
    forward.allocate_mask(save_mask);
    Backend(operands).forward(params);
    return {forward.output, mean, inv_std, forward.mask};
  }

  // The common part of the backward ops. It owns what the pointers of `params` point to. Tensors that forward saved may
  // have any strides, since hooks on saved tensors may change them.
  struct Backward {
    Operands& operands;
    Tensor grad_out;
    OptionalTensor residual, mask, weight, bias;
    Tensor mean, inv_std;
    BackwardParams params;

    Backward(Operands& operands, const Tensor& grad_out_argument, const OptionalTensor& residual_argument,
             const OptionalTensor& mask_argument, const OptionalTensor& weight_argument,
             const OptionalTensor& bias_argument, const Tensor& mean_argument, const Tensor& inv_std_argument,
             int64_t activation, std::optional<double> activation_param)
        : operands(operands),
          mask(operands.contiguous("mask", mask_argument)),
          weight(operands.contiguous("weight", weight_argument)),
          bias(operands.contiguous("bias", bias_argument)),
          mean(operands.contiguous("mean", mean_argument)),
          inv_std(operands.contiguous("inv_std", inv_std_argument)) {
      params.activation = operands.activation(activation);
      params.activation_param = ActivationParam(operands.activation_param(params.activation, activation_param));
      if (is_piecewise_linear(params.activation)) operands.follow_mask(mask);
      grad_out = operands.dense("grad_out", grad_out_argument);
      params.layout = operands.layout();
      params.dtype = operands.dtype();
      params.weight = operands.channel_vector("weight", weight);
      params.bias = operands.channel_vector("bias", bias);
      params.mean = operands.channel_float64("mean", mean);
      params.inv_std = operands.channel_float64("inv_std", inv_std);
      params.grad_out = grad_out.const_data_ptr();
      params.input = operands.input().const_data_ptr();
      if (params.activation == Activation::none) return;
      if (is_piecewise_linear(params.activation)) params.mask = operands.mask(mask);
      if (params.mask) return;
      residual = operands.dense("residual", residual_argument);
      params.residual = residual ? residual->const_data_ptr() : nullptr;
    }

    Two allocate(bool need_input, bool need_residual) {
      const ScalarType type = operands.input().scalar_type();
      Tensor grad_input = need_input ? operands.empty_like_input() : operands.nothing(type);
      Tensor grad_residual = need_residual ? operands.empty_like_input() : operands.nothing(type);
      params.grad_input = need_input ? grad_input.data_ptr() : nullptr;
      params.grad_residual = need_residual ? grad_residual.data_ptr() : nullptr;
      return {grad_input, grad_residual};
    }
  };
};

}  // namespace fastbn
