// The two sums that the gradients of a channel need: of grad_z, and of grad_z * (x - pivot) about a number near the
// mean, which is corrected to xhat once per channel. If float sums overflow or underflow, or meet inf or NaN, the
// block starts again in double.
#pragma once

#include "cuda/block/reduce.cuh"
#include "cuda/element/grad_z.cuh"

namespace fastbn::cuda {

// Coefficients that recompute z, and the pivot of the sums. The rounding of x - pivot is visible only in float32:
// float64 is too fine for it, and elements of half types are themselves rounded far more.
template <class T>
struct SumCoefficients {
  using A = acc_t<T>;
  static constexpr bool has_pivot = sizeof(T) == sizeof(float);

  Affine<A> affine;
  float float_pivot;

  FASTBN_DEVICE A pivot() const { return has_pivot ? A(float_pivot) : affine.pivot; }
};

// Returns a number near the mean about which float32 terms are exact; the mean itself if that is a float, so that all
// terms of a constant channel are 0.
FASTBN_DEVICE float float_pivot_of(double mean, double inv_std) {
  const float rounded = pivot_of_elements<float>(mean, inv_std);
  return double(rounded) == mean ? rounded : float(grad_pivot_of(mean, inv_std));
}

template <class T>
FASTBN_DEVICE SumCoefficients<T> sum_coefficients(const BackwardParams& params, int64_t channel) {
  const float pivot = SumCoefficients<T>::has_pivot ? float_pivot_of(params.mean[channel], params.inv_std[channel]) : 0;
  return {affine_of<acc_t<T>>(params, channel), pivot};
}

FASTBN_DEVICE double pivot_of_sums(const BackwardParams& params, int64_t channel) {
  const double mean = params.mean[channel];
  switch (params.dtype) {
    case DType::float64: return mean;
    case DType::float32: return float_pivot_of(mean, params.inv_std[channel]);
    case DType::bfloat16:
    case DType::float16: return pivot_of_elements<float>(mean, params.inv_std[channel]);
  }
  __builtin_unreachable();
}

// Recomputes a thread's totals in double, element by element. It runs rarely, so it saves registers rather than time.
// `shared` holds the coefficients of the tile's channels.
template <class T, class Walk>
FASTBN_DEVICE void total_grads_in_double(Walk walk, ReduceMemory<Walk::channels>& memory,
                                         const GradZ<T, Walk::aligned>& grad_z, const SumCoefficients<T>* shared) {
  const int thread = device::thread_index();
  for (int i = 0; i < Walk::channels; ++i) memory.first[i][thread] = memory.second[i][thread] = 0;
  FASTBN_KEEP_LOOP
  while (walk.more()) {
    const Step step = walk.step();
    FASTBN_KEEP_LOOP
    for (int i = 0; i < (Walk::aligned ? vec_size : step.count); ++i) {
      const SumCoefficients<T>& coefficients = shared[walk.channel_of(i)];
      const double x = grad_z.load_x(step, i), grad = grad_z.load_grad(step, i, coefficients.affine);
      memory.first[i % Walk::channels][thread] += grad;
      memory.second[i % Walk::channels][thread] += grad * (x - double(coefficients.pivot()));
    }
    walk.next();
  }
}

// Sums over the work of a block. each(light_epilogue, use) calls use(step, item) for its vectors, with items of grad_z,
// where light_epilogue is from grad_z.dispatch_epilogue. also(step, grad) gets the grad_z of each vector. One thread
// per channel of the tile calls save(channel, sums); without x in the items the second sum is arbitrary. `scratch`
// holds the coefficients of all channels of the tile, as share_coefficients leaves them, and `coefficients` those of
// the thread.
template <class T, class Walk, class Each, class Also, class Save>
FASTBN_DEVICE void block_grad_sums(const Walk& walk, ReduceMemory<Walk::channels>& memory,
                                   const GradZ<T, Walk::aligned>& grad_z, const SumCoefficients<T>* scratch,
                                   const SumCoefficients<T> (&coefficients)[Walk::channels], Each each, Also also,
                                   Save save) {
  using A = acc_t<T>;
  Affine<A> affine[Walk::channels];
  FASTBN_UNROLL
  for (int i = 0; i < Walk::channels; ++i) affine[i] = coefficients[i].affine;
  grad_z.dispatch_epilogue([&](auto light_epilogue) {
    sum_vectors<T, A>(
        memory, [&](auto use) { each(light_epilogue, use); },
        [&](const Step& step, const auto& item, A(&sum)[vec_size], A(&shifted)[vec_size]) {
          A grad[vec_size];
          grad_z.template compute<light_epilogue.value>(item, affine, grad);
          also(step, grad);
          FASTBN_UNROLL
          for (int i = 0; i < vec_size; ++i) {
            if (!Walk::aligned && i >= step.count) grad[i] = 0;
            sum[i] += grad[i];
            shifted[i] += grad[i] * (item.x[i] - coefficients[i % Walk::channels].pivot());
          }
        });
  });
  bool resolved = true;
  reduce_totals(walk, memory, [&](int channel, const Sums& sums) {
    save(channel, sums);
    const bool is_exact_zero = sums.first == 0 || grad_z.may_be_zero(walk.first_channel + channel);
    resolved = resolved && resolves(grad_z.reads_input() ? sums : Sums{sums.first, 0}, is_exact_zero);
  });
  if constexpr (sizeof(A) < sizeof(double)) {
    if (block_agrees(resolved, memory.votes)) return;
    total_grads_in_double(walk, memory, grad_z, scratch);
    reduce_totals(walk, memory, save);
  }
}

FASTBN_DEVICE double sum_grad_xhat(const BackwardParams& params, int64_t channel, const Sums& sums) {
  if (params.layout.numel() == 0) return 0;  // whatever inv_std is: running statistics may give NaN
  return sum_grad_xhat_of(sums.first, sums.second, pivot_of_sums(params, channel), params.mean[channel],
                          params.inv_std[channel]);
}

// Writes the results of a channel's sums over all of its elements that are wanted.
FASTBN_DEVICE void save_grad_sums(const BackwardParams& params, int64_t channel, double sum_grad, double xhat) {
  if (params.sum_grad) params.sum_grad[channel] = sum_grad;
  if (params.sum_grad_xhat) params.sum_grad_xhat[channel] = xhat;
  if (params.grad_bias.defined()) params.grad_bias.store(channel, sum_grad);
  if (params.grad_weight.defined()) params.grad_weight.store(channel, xhat);
}

}  // namespace fastbn::cuda
