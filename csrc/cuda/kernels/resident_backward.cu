// A backward in one launch that reads grad_out and the input once: the blocks of a channel tile keep both on chip,
// exchange their sums, and make grad_input from what is on chip while they load their next tile. If a tile does not fit
// on the chip, they keep a part of it and read the rest again.
#include "cuda/block/coefficients.cuh"
#include "cuda/block/tiles.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/grad_sums.cuh"
#include "cuda/element/input_grad.cuh"
#include "cuda/kernels/passes.cuh"

namespace fastbn::cuda {
namespace {

// The sums of a channel of the tile over all blocks. They replace totals that have been added up.
struct Merged {
  double sum_grad, sum_grad_xhat;
};

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm(sizeof(T), Walk::kind, true, Walk::aligned)))
    resident_backward_kernel(BackwardParams params, Plan plan, void* workspace) {
  using A = acc_t<T>;
  const SharedMemoryMap<T, GradCoefficients<A>> map(plan, Walk::channels);
  auto& memory = reduce_memory<Walk::channels>();
  auto* const coefficients = map.coefficients.in(&memory);
  SmemRing<T> ring(map.ring.in(&memory), plan);
  PartialExchange exchange(plan, map.exchange.in(&memory), workspace);

  const GradZ<T, Walk::aligned> grad_z(params, plan, true);
  const auto fetch = [&](const Step& step, int slot) { grad_z.fetch(ring, step, slot); };

  auto* const scratch = map.template scratch_in<SumCoefficients<T>>(&memory);
  auto* const merged = reinterpret_cast<Merged*>(memory.first);
  for_each_tile<Walk>(params.layout, plan, ring, exchange, fetch, [&](const Walk& walk, bool) {
    const bool is_far = any_is_far<A>(params, walk, memory.votes);
    SumCoefficients<T> coefficients_of_sums[Walk::channels];
    share_coefficients(
        walk, scratch, [&](int64_t channel) { return sum_coefficients<T>(params, channel); }, coefficients_of_sums);
    block_grad_sums(
        walk, memory, grad_z, scratch, coefficients_of_sums,
        [&](auto light_epilogue, auto use) {
          for_each_in_ring<light_epilogue.value && !Walk::by_rows ? unroll_of(sizeof(T)) : 1>(
              walk, ring, [&](const Step& step) { return grad_z.load_mask(step); },
              [&](const Step& step, uint8_t mask) { use(step, grad_z.load(ring, mask)); },
              [&](const Step& step, int visit) { ring.after_sums(walk, step, visit, fetch); });
        },
        [](const Step&, const auto&) {}, [&](int channel, const Sums& sums) { exchange.publish(channel, sums); });
    exchange.sync();

    by_teams(walk.tile_channels, [&](int channel, int lane, int team, bool exists) {
      const Sums sums = exchange.reduce(channel, lane, team);
      if (!exists || lane != 0) return;
      const int c = walk.first_channel + channel;
      const double xhat = sum_grad_xhat(params, c, sums);
      merged[channel] = {sums.first, xhat};
      coefficients[channel] = grad_coefficients<A>(params, c, sums.first, xhat, double(params.layout.count()), is_far);
    });
    device::sync_block();
    if (exchange.is_leader()) {
      for_each_tile_channel(walk, [&](int channel, int64_t c) {
        save_grad_sums(params, c, merged[channel].sum_grad, merged[channel].sum_grad_xhat);
      });
    }
    GradCoefficients<A> coefficients_of_grads[Walk::channels];
    load_coefficients(walk, coefficients, coefficients_of_grads);

    const InputGrad<T, Walk::aligned> input_grad(params, plan, false, is_far);
    ring.begin_output_pass(walk);
    grad_z.dispatch_epilogue([&](auto light_epilogue) {
      for_each_in_ring<light_epilogue.value && !Walk::by_rows ? unroll_of(sizeof(T)) : 1>(
          ResidentFirst(walk), ring, [&](const Step& step) { return grad_z.load_mask(step); },
          [&](const Step& step, uint8_t mask) {
            input_grad.template operator()<light_epilogue.value>(step, grad_z, grad_z.load(ring, mask),
                                                                 coefficients_of_grads);
          },
          [&](const Step& step, int visit) { ring.after_output(walk, step, visit, fetch); });
    });
  });
}

}  // namespace

cudaError_t launch_resident_backward(const BackwardParams& params, const Plan& plan, void* workspace,
                                     cudaStream_t stream) {
  return dispatch(params.dtype, params.layout, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_backward_kernel<T, Walk>, (sums_shape<T, GradCoefficients<acc_t<T>>>(plan)), stream,
                          params, plan, workspace);
  });
}

}  // namespace fastbn::cuda
