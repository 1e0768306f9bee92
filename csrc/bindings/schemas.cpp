// The contract of the ops (docs/design.md), one schema per op. The tests' emulator registers the same schemas in its
// own namespace.
#include "bindings/stable.h"

STABLE_TORCH_LIBRARY(FASTBN_NAMESPACE, m) {
  m.def(
      "batch_norm_train(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, int activation, "
      "bool save_mask, float? activation_param=None) -> (Tensor output, Tensor mean, Tensor inv_std, Tensor mask)");
  m.def(
      "batch_norm_eval(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, int activation, float? activation_param=None) -> Tensor output");
  m.def(
      "batch_norm_frozen(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor running_mean, "
      "Tensor running_var, float eps, int activation, bool save_mask, float? activation_param=None) "
      "-> (Tensor output, Tensor mean, Tensor inv_std, Tensor mask)");
  m.def(
      "batch_norm_backward(Tensor grad_out, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor inv_std, bool batch_stats, int activation, bool need_input, "
      "bool need_weight, bool need_bias, bool need_residual, float? activation_param=None) -> (Tensor grad_input, "
      "Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");
  m.def("channel_stats(Tensor input) -> (Tensor mean, Tensor var)");
  m.def(
      "normalize(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor inv_std, "
      "int activation, bool save_mask, float? activation_param=None) -> (Tensor output, Tensor mask)");
  m.def(
      "grad_sums(Tensor grad_out, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor inv_std, int activation, float? activation_param=None) -> (Tensor sum_grad, "
      "Tensor sum_grad_xhat)");
  m.def(
      "input_grad(Tensor grad_out, Tensor input, Tensor? residual, Tensor? mask, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor inv_std, Tensor? sum_grad, Tensor? sum_grad_xhat, Tensor? count, int activation, "
      "bool need_residual, float? activation_param=None) -> (Tensor grad_input, Tensor grad_residual)");
}
