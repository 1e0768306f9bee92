// A training forward in one launch that reads the input once: the blocks of a cluster keep their channels' elements on
// chip, exchange their moments through distributed shared memory, and normalise what they kept.
#include "cuda/moments.cuh"
#include "cuda/normalize.cuh"
#include "cuda/passes.cuh"
#include "cuda/slab.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, sizeof(T) == sizeof(double) ? 1 : 2)
    resident_forward_kernel(ForwardParams params, Plan plan) {
  using A = acc_t<T>;
  const SharedMemory parts = shared_memory_of(plan, false, sizeof(A), octet * sizeof(T));
  char* const shared = device::shared_memory<char>();
  Moments* const exchange = reinterpret_cast<Moments*>(shared + parts.totals + parts.scratch);
  char* const coefficients = reinterpret_cast<char*>(exchange) + parts.exchange;
  Slab<T> slab(coefficients + parts.coefficients, plan);

  const T* input = static_cast<const T*>(params.input);
  const Walk walk(params.layout, plan, Order::ascending);
  slab.bring(
      walk, [&](const Step& step, int slot) { slab.fetch(slot, 0, input + step.offset, step.count, plan.vectorized); });
  const Batches batches(params);
  block_moments<T>(
      walk, ReduceMemory<Walk::channels>(),
      [&](const Step&, int slot) {
        slab.await(slot);
        return slab.load(slot, 0);
      },
      [&](int i, const Moments& moments) { exchange[walk.channel - walk.slice_channel + i] = moments; });
  device::sync_cluster();

  Affine<A> affine[Walk::channels];
  share_coefficients(
      walk, params.layout.channels, coefficients,
      [&](int64_t channel) {
        const Moments moments = merge_cluster(exchange + (channel - walk.slice_channel), MergeMoments());
        if (walk.split == 0) save_statistics(params, channel, moments, batches.number());
        return Affine<A>::make(moments.mean, inv_std_of(moments.var(), params.eps), params.weight.load_or(channel, 1),
                               params.bias.load_or(channel, 0));
      },
      affine);
  batches.count();

  const Normalize<T> normalize(params, plan);
  struct Item {
    Octet<T> x, residual;
  };
  for_each_octet<many_in_flight>(
      walk, [&](const Step& step, int slot) { return Item{slab.load(slot, 0), normalize.load_residual(step)}; },
      [&](const Step& step, const Item& item) { normalize(step, item.x, item.residual, affine); });
  device::sync_cluster();  // the others may still read this block's moments
}

}  // namespace

cudaError_t launch_resident_forward(const ForwardParams& params, const Plan& plan, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_forward_kernel<T, Walk>, sums_shape<T>(plan, false), stream, params, plan);
  });
}

}  // namespace fastbn::cuda
