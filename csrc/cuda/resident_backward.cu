// A backward in one launch that reads grad_out and the input once: the blocks of a cluster keep both on chip, exchange
// their sums through distributed shared memory, and make grad_input from what they kept.
#include "cuda/grad_sums.cuh"
#include "cuda/input_grad.cuh"
#include "cuda/passes.cuh"
#include "cuda/slab.cuh"

namespace fastbn::cuda {
namespace {

// Two blocks share a multiprocessor, but where 128 registers are too few.
template <class T, class Walk>
constexpr int blocks_together = sizeof(T) == sizeof(double) || (Walk::by_rows && sizeof(T) == sizeof(float)) ? 1 : 2;

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(most_threads, (blocks_together<T, Walk>))
    resident_backward_kernel(BackwardParams params, Plan plan) {
  using A = acc_t<T>;
  const SharedMemory parts = shared_memory_of(plan, true, sizeof(A), octet * sizeof(T));
  char* const shared = device::shared_memory<char>();
  GradSums* const exchange = reinterpret_cast<GradSums*>(shared + parts.totals + parts.scratch);
  char* const coefficients = reinterpret_cast<char*>(exchange) + parts.exchange;
  Slab<T> slab(coefficients + parts.coefficients, plan);

  const Walk walk(params.layout, plan, Order::ascending);
  const GradZ<T> grad_z(params, plan, true);
  slab.bring(walk, [&](const Step& step, int slot) { grad_z.fetch(slab, step, slot); });

  const ReduceMemory<Walk::channels> memory;
  Affine<A> affine[Walk::channels];
  share_coefficients(
      walk, params.layout.channels, memory.scratch, [&](int64_t channel) { return affine_of<A>(params, channel); },
      affine);
  device::sync_block();  // the merges below write where the coefficients were
  block_grad_sums(
      walk, memory, grad_z, affine, true,
      [&](const Step& step, int slot) {
        slab.await(slot);
        return grad_z.load(slab, step, slot);
      },
      [&](int i, const GradSums& sums) { exchange[walk.channel - walk.slice_channel + i] = sums; });
  device::sync_cluster();

  GradCoefficients<A> both[Walk::channels];
  share_coefficients(
      walk, params.layout.channels, coefficients,
      [&](int64_t channel) {
        const GradSums sums = merge_cluster(exchange + (channel - walk.slice_channel), AddGradSums());
        const double xhat = sum_grad_xhat(params, channel, sums);
        if (walk.split == 0) save_grad_sums(params, channel, sums.grad, xhat);
        return grad_coefficients<A>(params, channel, sums.grad, xhat, double(params.layout.count()));
      },
      both);

  const InputGrad<T> input_grad(params, plan, false);
  for_each_octet(
      walk, [&](const Step& step, int slot) { return grad_z.load(slab, step, slot); },
      [&](const Step& step, const auto& item) { input_grad(step, grad_z, item, affine, both); });
  device::sync_cluster();  // the others may still read this block's sums
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& params, const Plan& plan, cudaStream_t stream) {
  return dispatch(params.dtype, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_backward_kernel<T, Walk>, sums_shape<T>(plan, true), stream, params, plan);
  });
}

}  // namespace fastbn::cuda
