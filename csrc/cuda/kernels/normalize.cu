// The normalisation: the last pass of two-phase plans, and the only one of evaluation.
#include "cuda/block/coefficients.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/normalize.cuh"
#include "cuda/kernels/passes.cuh"
#include "math/moments.h"

namespace fastbn::cuda {
namespace {

// The parameters of a channel, which no launch of the op writes.
struct Parameters {
  double weight, bias;
};

struct Normalizer {
  double mean, inv_std;
};

FASTBN_DEVICE Normalizer normalizer_of(const ForwardParams& params, int64_t channel) {
  if (params.statistics != Statistics::running) return {params.mean[channel], params.inv_std[channel]};
  return {params.running_mean.load(channel), inv_std_of(params.running_var.load(channel), params.eps)};
}

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm<T, Walk>(Pass::normalize)))
    normalize_kernel(ForwardParams params, Plan plan) {
  using A = acc_t<T>;
  const T* input = static_cast<const T*>(params.input);
  const Normalize<T, Walk::aligned> normalize(params, plan);
  const Walk walk = walk_of_block<Walk>(params.layout, plan, Order::reversed);

  const bool saves = params.statistics == Statistics::running && walk.split == 0;
  Affine<A> affine[Walk::channels];
  share_coefficients_after_wait(
      walk, LastPassMap<Affine<A>>(plan).coefficients.in(device::shared_memory<char>()),
      [&](int64_t channel) { return Parameters{params.weight.load_or(channel, 1), params.bias.load_or(channel, 0)}; },
      [&](int64_t channel, const Parameters& parameters) {
        const Normalizer n = normalizer_of(params, channel);
        if (saves && params.mean) params.mean[channel] = n.mean;
        if (saves && params.inv_std) params.inv_std[channel] = n.inv_std;
        return Affine<A>::make(n.mean, n.inv_std, parameters.weight, parameters.bias);
      },
      affine);

  struct Item {
    Vec8<T> x, residual;
  };
  dispatch_epilogue(params.activation, [&](auto light_epilogue) {
    for_each_vector<light_epilogue.value && Walk::aligned ? vectors_in_flight<sizeof(Vec8<T>)> : 1>(
        walk,
        [&](const Step& step) {
          const auto x = load_vec<Walk::aligned>(input + step.offset, step.count, plan.vectorized);
          return Item{x, normalize.load_residual(step)};
        },
        [&](const Step& step, const Item& item) {
          normalize.template operator()<light_epilogue.value>(step, item.x, item.residual, affine);
        });
  });
}

}  // namespace

cudaError_t launch_normalize(const ForwardParams& params, const Plan& plan, bool finished, cudaStream_t stream) {
  const Plan last = last_pass_of(plan, params.layout);
  return dispatch(params.dtype, params.layout, last, [&]<class T, class Walk>() {
    return device::launch(&normalize_kernel<T, Walk>,
                          last_shape(last, LastPassMap<Affine<acc_t<T>>>(last).bytes(), finished), stream, params,
                          last);
  });
}

}  // namespace fastbn::cuda
