// A training forward in one launch that reads the input once: the blocks of a channel tile keep its elements on chip,
// exchange their sums, and normalise what is on chip while they load their next tile. If a tile does not fit on the
// chip, they keep a part of it and read the rest again.
#include "cuda/block/batch_counter.cuh"
#include "cuda/block/coefficients.cuh"
#include "cuda/block/tiles.cuh"
#include "cuda/block/vector_loop.cuh"
#include "cuda/element/moments.cuh"
#include "cuda/element/normalize.cuh"
#include "cuda/kernels/passes.cuh"

namespace fastbn::cuda {
namespace {

// Scratch memory of a channel of the tile: numbers that are loaded while its elements are in flight, later its moments.
union Channel {
  struct {
    double pivot, weight, bias;
  } prepared;
  Moments moments;
};

template <class T, class Walk>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(max_threads, (blocks_per_sm(sizeof(T), Walk::kind, false, Walk::aligned)))
    resident_forward_kernel(ForwardParams params, Plan plan, void* workspace) {
  using A = acc_t<T>;
  const SharedMemoryMap<T, Affine<A>> map(plan, Walk::channels);
  auto& memory = reduce_memory<Walk::channels>();
  auto* const coefficients = map.coefficients.in(&memory);
  SmemRing<T> ring(map.ring.in(&memory), plan);
  PartialExchange exchange(plan, map.exchange.in(&memory), workspace);

  const T* input = static_cast<const T*>(params.input);
  const auto fetch = [&](const Step& step, int slot) {
    ring.template fetch<Walk::aligned>(slot, 0, input + step.offset, step.count, plan.vectorized);
  };
  const BatchCounter batches(params, plan, static_cast<uint32_t*>(workspace));
  const int64_t batch = batches.number();

  for_each_tile<Walk>(params.layout, plan, ring, exchange, fetch, [&](const Walk& walk, bool is_first) {
    auto* const scratch = map.template scratch_in<Channel>(&memory);
    for_each_tile_channel(walk, [&](int channel, int64_t c) {
      scratch[channel].prepared = {pivot_of(params, c), params.weight.load_or(c, 1), params.bias.load_or(c, 0)};
    });
    device::sync_block();
    A pivot[Walk::channels];
    walk.for_each_channel([&](int i, int channel) { pivot[i] = A(scratch[channel].prepared.pivot); });

    block_moments<T>(
        walk, memory, pivot,
        [&](auto use) {
          for_each_in_ring<Walk::by_rows ? 1 : unroll_of(sizeof(T))>(
              walk, ring, [](const Step&) { return Nothing(); },
              [&](const Step& step, Nothing) { use(step, ring.load(0)); },
              [&](const Step& step, int visit) { ring.after_sums(walk, step, visit, fetch); });
        },
        [&](auto use) {
          for_each_vector<1>(
              walk,
              [&](const Step& step) {
                return load_vec<Walk::aligned>(input + step.offset, step.count, plan.vectorized);
              },
              use);
        },
        [&](int channel, const Sums& sums) { exchange.publish(channel, sums); });
    exchange.sync();
    if (is_first) batches.increment();

    by_teams(walk.tile_channels, [&](int channel, int lane, int team, bool exists) {
      const Sums sums = exchange.reduce(channel, lane, team);
      if (!exists || lane != 0) return;
      const auto [pivot, weight, bias] = scratch[channel].prepared;
      const Moments moments = moments_of(params.layout, pivot, sums);
      coefficients[channel] = Affine<A>::make(moments.mean, inv_std_of(moments.var(), params.eps), weight, bias);
      scratch[channel].moments = moments;
    });
    device::sync_block();
    if (exchange.is_leader()) {
      for_each_tile_channel(walk, [&](int channel, int64_t c) {
        save_statistics(params, c, scratch[channel].moments, device::opaque(batch));
      });
    }
    Affine<A> affine[Walk::channels];
    load_coefficients(walk, coefficients, affine);

    const Normalize<T, Walk::aligned> normalize(params, plan);
    ring.begin_output_pass(walk);
    dispatch_epilogue(params.activation, [&](auto light_epilogue) {
      for_each_in_ring<light_epilogue.value && !Walk::by_rows ? unroll_of(sizeof(T)) : 1>(
          ResidentFirst(walk), ring, [&](const Step& step) { return normalize.load_residual(step); },
          [&](const Step& step, const Vec8<T>& residual) {
            normalize.template operator()<light_epilogue.value>(step, ring.load(0), residual, affine);
          },
          [&](const Step& step, int visit) { ring.after_output(walk, step, visit, fetch); });
    });
  });
}

}  // namespace

cudaError_t launch_resident_forward(const ForwardParams& params, const Plan& plan, void* workspace,
                                    cudaStream_t stream) {
  return dispatch(params.dtype, params.layout, plan, [&]<class T, class Walk>() {
    return device::launch(&resident_forward_kernel<T, Walk>, (sums_shape<T, Affine<acc_t<T>>>(plan)), stream, params,
                          plan, workspace);
  });
}

}  // namespace fastbn::cuda
