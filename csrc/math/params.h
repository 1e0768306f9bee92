// The arguments of the forward and backward ops, as the bindings pass them to a backend's launchers. Pointers are to
// dense memory of one layout, and null if absent or not wanted.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/macros.h"
#include "math/types.h"

namespace fastbn {

// The source of the statistics that normalise.
enum class Statistics { batch, running, given };

// An activation's parameter in both types that elements are computed in, so that no kernel converts it.
struct ActivationParam {
  double in_double = 0;
  float in_float = 0;

  ActivationParam() = default;
  explicit ActivationParam(double value) : in_double(value), in_float(float(value)) {}

  template <class A>
  FASTBN_INLINE A in() const {
    if constexpr (sizeof(A) == sizeof(double))
      return in_double;
    else
      return in_float;
  }
};

// The arguments of batch_norm_train, batch_norm_eval, batch_norm_frozen, normalize and channel_stats.
struct ForwardParams {
  Layout layout;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  ActivationParam activation_param;
  Statistics statistics = Statistics::batch;

  const void* input = nullptr;
  const void* residual = nullptr;
  void* output = nullptr;
  uint8_t* mask = nullptr;

  ChannelVector weight, bias;
  ChannelVector running_mean, running_var;  // read by `running`, updated by `batch`
  int64_t* num_batches_tracked = nullptr;
  bool has_momentum = true;
  double momentum = 0;
  double eps = 0;

  double* mean = nullptr;     // [C]: read by `given`, else written unless null
  double* inv_std = nullptr;  // [C]: same as mean
  double* var = nullptr;      // [C]: written by channel_stats
};

// The arguments of batch_norm_backward, grad_sums and input_grad.
struct BackwardParams {
  Layout layout;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
  ActivationParam activation_param;
  // batch: reduce and use the sums; running: frozen statistics; given: use sum_grad, sum_grad_xhat and count.
  Statistics statistics = Statistics::batch;

  const void* grad_out = nullptr;
  const void* input = nullptr;
  const void* residual = nullptr;
  const uint8_t* mask = nullptr;

  ChannelVector weight, bias;
  const double* mean = nullptr;     // [C]
  const double* inv_std = nullptr;  // [C]

  void* grad_input = nullptr;
  void* grad_residual = nullptr;
  ChannelVector grad_weight, grad_bias;

  double* sum_grad = nullptr;       // [C]: written by grad_sums, read by `given`
  double* sum_grad_xhat = nullptr;  // [C]: same as sum_grad
  const double* count = nullptr;    // [1]: elements per channel over all ranks, read by `given`
};

}  // namespace fastbn
