// A training forward in one launch that reads the input once: y = activation((x - mean) * inv_std * weight + bias +
// residual), with the mean and variance of the batch. The residual does not pass through the ring: it is read when the
// output is made.
#include "cuda/element/activate.cuh"
#include "cuda/element/moments.cuh"
#include "cuda/kernels/passes.cuh"
#include "cuda/kernels/stream.cuh"
#include "math/affine.h"

namespace fastbn::cuda {
namespace {

template <class T, Kernel kernel>
class StreamForward {
 public:
  using Params = ForwardParams;
  static constexpr int min_tensors = 1;  // in the ring
  using Map = ForwardMap;
  using Consumer = StreamConsumer<T, kernel, Map, stream_unroll(Direction::forward)>;
  static constexpr int size = vec16_size<T>;

  // Returns whether all blocks must have started before the first goes on: to exchange sums, or because all of them
  // read the number of batches before one increments it.
  static FASTBN_INLINE bool is_cooperative(const ForwardParams& params, const Plan& plan) {
    return plan.splits > 1 || (params.num_batches_tracked && !params.has_momentum && plan.groups > 1);
  }

  // Reads the number of batches before the grid meets. Keeps references to its arguments, which are the kernel's.
  FASTBN_DEVICE StreamForward(const ForwardParams& params, const Plan& plan)
      : params_(params),
        plan_(plan),
        batches_(params.num_batches_tracked && !params.has_momentum ? *params.num_batches_tracked + 1 : 0) {}

  FASTBN_DEVICE StreamTensors tensors() const { return {params_.input, nullptr, nullptr}; }

  FASTBN_DEVICE ForwardChannel prepare(int64_t channel, const FieldsOf& fields) const {
    const float pivot = float(pivot_of(params_, channel));
    fields[ForwardFields::sum_pivot] = pivot;
    return {params_.weight.load_or(channel, 1), params_.bias.load_or(channel, 0), pivot};
  }
  FASTBN_DEVICE bool is_far(const ForwardChannel&) const { return false; }

  // Counts this batch, once. If several blocks read the number of batches, the grid has met since.
  FASTBN_DEVICE void count_batch() const {
    if (device::block_x() == 0 && device::thread_index() == finisher_warp * device::kWarp &&
        params_.num_batches_tracked) {
      ++*params_.num_batches_tracked;
    }
  }

  template <class Work>
  FASTBN_DEVICE void sum_tile(const Work& work) const {
    Consumer& consumer = work.consumer;
    constexpr int n = Consumer::accumulators;
    float pivot[1][Consumer::channels], sum[n] = {}, squares[n] = {};
    consumer.load_fields(work.position, ForwardFields::sum_pivot, pivot);
    // hot loop: sums
    consumer.template sum_tile<Consumer::unroll>(
        work.position, work.width, [](const Vec16* where, int) { return load_vec16(where); },
        [&](Vec16*, const Vec16& x) {
          FASTBN_UNROLL
          for (int i = 0; i < size; ++i) {
            const float d = element_of<T>(x, i) - pivot[0][i % Consumer::channels];
            sum[i % n] += d;
            squares[i % n] += d * d;
          }
        });
    // end of hot loop
    consumer.publish(work.position, sum, squares);
  }

  FASTBN_DEVICE bool resolves(const ForwardChannel&, const Sums& sums, double count) const {
    return cuda::resolves(sums, sums.first == 0) && !cancels(sums, count);
  }

  FASTBN_DEVICE Sums sum_in_double(const StreamTiles& tiles, int tile, const Vec16* part, int channel,
                                   const ForwardChannel& prepared) const {
    Sums sums;
    for_each_element<T>(params_.layout, plan_, tiles, tile, part, channel, [&](const Vec16* where, int64_t, int i) {
      const double d = double(load_element<T>(where, i)) - double(prepared.pivot);
      sums.add({d, d * d});
    });
    return sums;
  }

  // Computes a channel's coefficients, and replaces its sums by what `save` needs: mean and m2.
  FASTBN_DEVICE void finish(const ForwardChannel& prepared, bool, Sums& sums, const FieldsOf& fields) const {
    const Moments moments = moments_of(params_.layout, prepared.pivot, sums);
    sums = {moments.mean, moments.m2};
    fields.set_affine(ForwardFields::affine, Affine<float>::make(moments.mean, inv_std_of(moments.var(), params_.eps),
                                                                 prepared.weight, prepared.bias));
  }
  FASTBN_DEVICE void save(int64_t channel, const Sums& sums) const {
    save_statistics(params_, channel, Moments{double(params_.layout.count()), sums.first, sums.second}, batches_);
  }

  template <class Work>
  FASTBN_DEVICE void write_tile(const Work& work) const {
    const bool is_light = has_light_epilogue(params_.activation), is_bare = !params_.residual && !params_.mask;
    if (is_light && is_bare) {
      params_.activation == Activation::relu ? write_bare<true>(work) : write_bare<false>(work);
    } else {
      is_light ? write<true>(work) : write<false>(work);
    }
  }

 private:
  template <class F, int n>
  static FASTBN_DEVICE void normalize(const Vec16& x, const F (&affine)[n], float (&z)[size]) {
    FASTBN_UNROLL
    for (int i = 0; i < size; ++i) z[i] = affine[i % n].apply(element_of<T>(x, i));
  }

  // Writes a tile without residual and mask, and with relu or without an activation.
  template <bool relu, class Work>
  FASTBN_DEVICE void write_bare(const Work& work) const {
    Consumer& consumer = work.consumer;
    Affine<float> affine[Consumer::channels];
    consumer.load_affine(work.position, ForwardFields::affine, affine);
    Vec16* const output = at_tile(params_.output, work.offset);
    consumer.walk.restart();
    // hot loop: write
    consumer.template write_tile<Consumer::unroll>(
        work.position, work.width, [](const Vec16* where, int) { return load_vec16(where); },
        [&](Vec16*, const Vec16& x) {
          float z[size];
          normalize(x, affine, z);
          store_vec16(output + consumer.walk.offset, vec16_of<T, relu>(z));
          consumer.next(consumer.walk);
        });
    // end of hot loop
  }

  struct Item {
    Vec16 x, residual;
    uint32_t offset;
  };

  // Writes a tile with everything. `light` is has_light_epilogue.
  template <bool light, class Work>
  FASTBN_DEVICE void write(const Work& work) const {
    Consumer& consumer = work.consumer;
    Affine<float> affine[Consumer::channels];
    consumer.load_affine(work.position, ForwardFields::affine, affine);
    Vec16* const output = at_tile(params_.output, work.offset);
    const Vec16* const residual = params_.residual ? at_tile(params_.residual, work.offset) : nullptr;
    const float lower_bound = params_.activation == Activation::relu ? 0 : -INFINITY;
    consumer.walk.restart();
    consumer.template write_tile<light ? 2 : 0>(
        work.position, work.width,
        [&](const Vec16* where, int) {
          Item item;
          item.x = load_vec16(where);
          item.offset = consumer.walk.offset;
          // A vector that is undefined without a residual would hold registers throughout the kernel.
          item.residual = residual ? load_vec16(residual + item.offset) : Vec16{};
          consumer.next(consumer.walk);
          return item;
        },
        [&](const Vec16* where, const Item& item) {
          float z[size];
          normalize(item.x, affine, z);
          if (residual) add(item.residual, z);
          if (params_.mask) {
            save_mask<light>(work.offset + item.offset, z, [&](float (&next)[size]) {
              Affine<float> affine_of_next[Consumer::channels];
              consumer.load_affine(work.position, ForwardFields::affine, affine_of_next, true);
              normalize(load_vec16(where + 1), affine_of_next, next);
              if (residual) add(load_vec16(residual + item.offset + 1), next);
            });
          }
          if constexpr (light) {
            FASTBN_UNROLL
            for (int i = 0; i < size; ++i) z[i] = device::max_or_nan(z[i], lower_bound);
          } else {
            activate(params_.activation, params_.activation_param.template in<float>(), z);
          }
          store_vec16(output + item.offset, vec16_of<T>(z));
        });
  }

  static FASTBN_DEVICE void add(const Vec16& residual, float (&z)[size]) {
    FASTBN_UNROLL
    for (int i = 0; i < size; ++i) z[i] += element_of<T>(residual, i);
  }

  // Stores the mask of a vector. A byte has the bits of two vectors of float32, and the thread of the first of them
  // stores it: compute_next(z) computes z of the second.
  template <bool light, class ComputeNext>
  FASTBN_DEVICE void save_mask(int64_t vector, const float (&z)[size], ComputeNext compute_next) const {
    const Activation activation = light ? Activation::relu : params_.activation;
    const uint32_t bits = mask_of(activation, z, size);
    if constexpr (size == vec_size) {
      params_.mask[vector] = uint8_t(bits);
    } else if (vector % 2 == 0) {
      float next[size];
      compute_next(next);
      params_.mask[vector / 2] = uint8_t(bits | uint32_t(mask_of(activation, next, size)) << size);
    }
  }

  const ForwardParams& params_;
  const Plan& plan_;
  const int64_t batches_;
};

template <class T, Kernel kernel>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(stream_threads, 1)
    stream_forward_kernel(ForwardParams params, Plan plan, ForwardMap map, device::Message16* messages) {
  run_stream<StreamForward<T, kernel>>(params, plan, map, messages);
}

}  // namespace

cudaError_t launch_stream_forward(const ForwardParams& params, const Plan& plan, void* messages, cudaStream_t stream) {
  return dispatch_stream(params.dtype, plan, [&]<class T, Kernel kernel>() {
    return device::launch(&stream_forward_kernel<T, kernel>, stream_shape<StreamForward<T, kernel>>(params, plan),
                          stream, params, plan, ForwardMap(plan), static_cast<device::Message16*>(messages));
  });
}

}  // namespace fastbn::cuda
