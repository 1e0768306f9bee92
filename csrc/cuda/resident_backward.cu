// A backward in one launch that reads grad_out and the input once: the blocks of a slice keep both on chip, exchange
// their sums, and make grad_input from what they kept while they bring in their next slice. Of a slice larger than the
// chip they keep a part and read the rest again.
#include "cuda/grad_sums.cuh"
#include "cuda/input_grad.cuh"
#include "cuda/passes.cuh"
#include "cuda/slices.cuh"

namespace fastbn::cuda {
namespace {

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, (blocks_together(sizeof(T), Walk::kind, true)))
    resident_backward_kernel(BackwardParams params, Plan plan, void* workspace) {
  using A = acc_t<T>;
  const SharedMemory parts = shared_memory_of(plan, true, sizeof(A), octet * sizeof(T));
  char* const exchange = device::shared_memory<char>() + parts.totals + parts.votes + parts.scratch;
  auto* const coefficients = reinterpret_cast<GradCoefficients<A>*>(exchange + parts.exchange);
  Slab<T> slab(exchange + parts.exchange + parts.coefficients, plan);
  Rendezvous<GradSums> rendezvous(plan, exchange, workspace);

  const GradZ<T> grad_z(params, plan, true);
  const auto fetch = [&](const Step& step, int place, bool is_last) { grad_z.fetch(slab, step, place, is_last); };

  const ReduceMemory<Walk::channels> memory;
  for_each_slice<Walk>(params.layout, plan, slab, rendezvous, fetch, [&](const Walk& walk, bool) {
    Affine<A> affine[Walk::channels];
    share_coefficients(walk, memory.scratch, [&](int64_t channel) { return affine_of<A>(params, channel); }, affine);
    block_grad_sums(
        walk, memory, grad_z, affine,
        [&](auto use) {
          for_each_masked_octet(walk, grad_z.mask(), [&](const Step& step, uint8_t mask, int visit) {
            use(step, grad_z.load(slab, slab.await(), mask), visit);
            slab.after_sums(walk, step, visit, fetch);
          });
        },
        [](const Step&, const auto&) {}, [&](int channel, const GradSums& sums) { rendezvous.own(channel) = sums; });
    rendezvous.meet();

    by_teams(walk.slice_channels, [&](int channel, int lane, int team, bool exists) {
      const GradSums sums =
          merge_parts<GradSums>(plan.splits, lane, team, [&](int rank) { return rendezvous.part(rank, channel); });
      if (!exists || lane != 0) return;
      const int c = walk.slice_channel + channel;
      const double xhat = sum_grad_xhat(params, c, sums);
      if (rendezvous.leads()) save_grad_sums(params, c, sums.grad, xhat);
      coefficients[channel] = grad_coefficients<A>(params, c, sums.grad, xhat, double(params.layout.count()));
    });
    device::sync_block();
    GradCoefficients<A> both[Walk::channels];
    take_coefficients(walk, coefficients, both);

    const InputGrad<T> input_grad(params, plan, false);
    slab.begin_last_pass();
    for_each_masked_octet(KeptFirst(walk), grad_z.mask(), [&](const Step& step, uint8_t mask, int visit) {
      input_grad(step, grad_z, grad_z.load(slab, slab.await(), mask), both);
      slab.after_output(walk, step, visit, fetch);
    });
  });
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& params, const Plan& plan, void* workspace,
                                     cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_backward_kernel<T, Walk>, sums_shape<T>(plan, true), stream, params, plan,
                          workspace);
  });
}

}  // namespace fastbn::cuda
