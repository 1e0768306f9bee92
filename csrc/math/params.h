// The arguments of the forward and of the backward ops, as the bindings hand them to a backend's launchers. Pointers
// are to dense memory of one layout; null where absent or not wanted.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/layout.h"
#include "math/types.h"

namespace fastbn {

// Where the statistics that normalise come from.
enum class Statistics { batch, running, given };

struct ForwardParams {
  Layout layout;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
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

  double* mean = nullptr;     // [C]: read by `given`, else written where not null
  double* inv_std = nullptr;  // [C]: likewise
  double* var = nullptr;      // [C]: written by channel_stats
};

struct BackwardParams {
  Layout layout;
  DType dtype = DType::float32;
  Activation activation = Activation::none;
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
  double* sum_grad_xhat = nullptr;  // [C]: likewise
  const double* count = nullptr;    // [1]: elements a channel over all ranks, read by `given`
};

}  // namespace fastbn
