// A training forward in one launch that reads the input once: the blocks of a slice keep its elements on chip, exchange
// their moments, and normalise what they kept while they bring in their next slice. Of a slice larger than the chip
// they keep a part and read the rest again.
#include "cuda/moments.cuh"
#include "cuda/normalize.cuh"
#include "cuda/passes.cuh"
#include "cuda/slices.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, (blocks_together(sizeof(T), Walk::kind, false)))
    resident_forward_kernel(ForwardParams params, Plan plan, void* workspace) {
  using A = acc_t<T>;
  const SharedMemory parts = shared_memory_of(plan, false, sizeof(A), octet * sizeof(T));
  char* const exchange = device::shared_memory<char>() + parts.totals + parts.votes + parts.scratch;
  auto* const coefficients = reinterpret_cast<Affine<A>*>(exchange + parts.exchange);
  Slab<T> slab(exchange + parts.exchange + parts.coefficients, plan);
  Rendezvous<Moments> rendezvous(plan, exchange, workspace);

  const T* input = static_cast<const T*>(params.input);
  const auto fetch = [&](const Step& step, int place, bool is_last) {
    slab.fetch(place, 0, input + step.offset, step.count, plan.vectorized, is_last);
  };
  const Batches batches(params);
  const int64_t batch = batches.number();

  for_each_slice<Walk>(params.layout, plan, slab, rendezvous, fetch, [&](const Walk& walk, bool is_first) {
    block_moments<T>(
        params.layout, plan, walk, ReduceMemory<Walk::channels>(),
        [&](const Step&) { return slab.load(slab.await(), 0); },
        [&](const Step& step, int visit) {
          const Octet<T> x = slab.load(slab.await(), 0);
          slab.after_sums(walk, step, visit, fetch);
          return x;
        },
        [&](const Step& step, int) { return load_octet(input + step.offset, step.count, plan.vectorized); },
        [&](int channel, const Moments& moments) { rendezvous.own(channel) = moments; });
    rendezvous.meet();
    if (is_first) batches.count();

    by_teams(walk.slice_channels, [&](int channel, int lane, int team, bool exists) {
      const Moments moments =
          merge_parts<MomentsSum>(plan.splits, lane, team, [&](int rank) { return rendezvous.part(rank, channel); });
      if (!exists || lane != 0) return;
      const int c = walk.slice_channel + channel;
      if (rendezvous.leads()) save_statistics(params, c, moments, device::anew(batch));
      coefficients[channel] = Affine<A>::make(moments.mean, inv_std_of(moments.var(), params.eps),
                                              params.weight.load_or(c, 1), params.bias.load_or(c, 0));
    });
    device::sync_block();
    Affine<A> affine[Walk::channels];
    take_coefficients(walk, coefficients, affine);

    const Normalize<T> normalize(params, plan);
    slab.begin_last_pass();
    for_each_octet<many_in_flight>(
        KeptFirst(walk), [&](const Step& step, int) { return normalize.load_residual(step); },
        [&](const Step& step, const Octet<T>& residual, int visit) {
          normalize(step, slab.load(slab.await(), 0), residual, affine);
          slab.after_output(walk, step, visit, fetch);
        });
  });
}

}  // namespace

cudaError_t launch_resident_forward(const ForwardParams& params, const Plan& plan, void* workspace,
                                    cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_forward_kernel<T, Walk>, sums_shape<T>(plan, false), stream, params, plan,
                          workspace);
  });
}

}  // namespace fastbn::cuda
