// A backward in one launch that reads grad_out and the input once. Where grad_z is grad_out or 0 it replaces grad_out
// in the ring as it is summed, so that neither mask nor derivative is needed again when the gradients are written.
#include "cuda/element/activate.cuh"
#include "cuda/element/grad_sums.cuh"
#include "cuda/kernels/passes.cuh"
#include "cuda/kernels/stream.cuh"
#include "math/affine.h"
#include "math/grad_coefficients.h"

namespace fastbn::cuda {
namespace {

// What grad_z is: grad_out itself; grad_out where the mask, or where relu's derivative at z, is 1 and else 0; or
// something that takes the activation's formula.
enum class GradSource { grad_out, mask, relu, formula };

FASTBN_INLINE GradSource source_of(const BackwardParams& params) {
  if (params.activation == Activation::none) return GradSource::grad_out;
  if (params.mask && is_piecewise_linear(params.activation)) {
    return leaks(params.activation) ? GradSource::formula : GradSource::mask;
  }
  return params.activation == Activation::relu ? GradSource::relu : GradSource::formula;
}

template <class T, Kernel kernel>
class StreamBackward {
 public:
  using Params = BackwardParams;
  static constexpr int min_tensors = 2;  // in the ring; a third is the residual
  using Map = BackwardMap;
  using Consumer = StreamConsumer<T, kernel, Map, stream_unroll(Direction::backward)>;
  static constexpr int size = vec16_size<T>, channels = Consumer::channels;

  // Returns whether all blocks must have started before the first goes on.
  static FASTBN_INLINE bool is_cooperative(const BackwardParams&, const Plan& plan) { return plan.splits > 1; }

  // Keeps references to its arguments, which are the kernel's.
  FASTBN_DEVICE StreamBackward(const BackwardParams& params, const Plan& plan) : params_(params), plan_(plan) {}

  FASTBN_DEVICE StreamTensors tensors() const { return {params_.grad_out, params_.input, params_.residual}; }

  FASTBN_DEVICE BackwardChannel prepare(int64_t channel, const FieldsOf& fields) const {
    const double mean = params_.mean[channel], inv_std = params_.inv_std[channel];
    const double weight = params_.weight.load_or(channel, 1);
    const auto affine = Affine<float>::make(mean, inv_std, weight, params_.bias.load_or(channel, 0));
    // The pivot of the sums, which for half types is that of the elements.
    const float pivot = sizeof(T) == sizeof(float) ? float_pivot_of(mean, inv_std) : affine.pivot;
    fields[BackwardFields::sum_pivot] = pivot;
    fields.set_affine(BackwardFields::sum_affine, affine);
    return {mean, inv_std, weight, affine, pivot};
  }
  FASTBN_DEVICE bool is_far(const BackwardChannel& prepared) const { return is_far_from_one(prepared.inv_std); }

  FASTBN_DEVICE void count_batch() const {}

  template <class Work>
  FASTBN_DEVICE void sum_tile(const Work& work) const {
    switch (source()) {
      case GradSource::grad_out: return sum<GradSource::grad_out, false>(work);
      case GradSource::mask: return sum<GradSource::mask, false>(work);
      case GradSource::relu:
        return plan_.stream.tensors > 2 ? sum<GradSource::relu, true>(work) : sum<GradSource::relu, false>(work);
      case GradSource::formula: return sum_by_formula(work);
    }
  }

  FASTBN_DEVICE bool resolves(const BackwardChannel& prepared, const Sums& sums, double) const {
    return cuda::resolves(sums, sums.first == 0 || !loses_underflowed_products(prepared.inv_std));
  }

  FASTBN_DEVICE Sums sum_in_double(const StreamTiles& tiles, int tile, const Vec16* part, int channel,
                                   const BackwardChannel& prepared) const {
    Sums sums;
    for_each_element<T>(
        params_.layout, plan_, tiles, tile, part, channel, [&](const Vec16* where, int64_t offset, int i) {
          const float x = load_element<T>(where + plan_.stream.vectors_per_split, i);
          const double grad = source() == GradSource::formula ? element_grad(where, offset, i, x, prepared.affine)
                                                              : load_element<T>(where, i);
          sums.add({grad, grad * (double(x) - double(prepared.pivot))});
        });
    return sums;
  }

  // Computes a channel's coefficients, and replaces its sums by what `save` writes: sum_grad and sum_grad_xhat.
  FASTBN_DEVICE void finish(const BackwardChannel& prepared, bool is_far, Sums& sums, const FieldsOf& fields) const {
    const double mean = prepared.mean, inv_std = prepared.inv_std;
    sums.second = sum_grad_xhat_of(sums.first, sums.second, prepared.pivot, mean, inv_std);
    const auto grad = GradAffine<float>::make(mean, inv_std, prepared.weight, sums.first, sums.second,
                                              double(params_.layout.count()), is_far);
    fields.set_affine(BackwardFields::affine, prepared.affine);
    fields[BackwardFields::slope] = grad.slope;
    fields[BackwardFields::mean_grad] = grad.mean_grad;
    fields[BackwardFields::rest] = grad.rest;
  }
  FASTBN_DEVICE void save(int64_t channel, const Sums& sums) const {
    save_grad_sums(params_, channel, sums.first, sums.second);
  }

  template <class Work>
  FASTBN_DEVICE void write_tile(const Work& work) const {
    const bool is_far = work.ring.is_far(work.position) != 0;
    if (source() == GradSource::formula || is_far) return write_in_general(work, is_far);
    params_.grad_residual ? write<true>(work) : write<false>(work);
  }

 private:
  static constexpr int n = Consumer::accumulators;
  // Coefficients of several channels leave registers for one vector at a time, which where relu's derivative is
  // recomputed takes a rolled loop: the compiler would load the second vector with the first.
  static constexpr int batch = Consumer::by_rows ? 1 : Consumer::unroll, rolled_batch = Consumer::by_rows ? 0 : batch;

  template <class Work>
  static FASTBN_DEVICE void load_grad_affine(const Work& work, GradAffine<float> (&affine)[channels]) {
    float values[6][channels];
    work.consumer.load_fields(work.position, BackwardFields::affine, values);
    FASTBN_UNROLL
    for (int i = 0; i < channels; ++i) {
      affine[i] = {values[0][i], values[3][i], values[4][i], values[5][i], values[1][i]};
    }
  }

  struct Item {
    Vec16 grad_out, x, residual;
    uint32_t mask, offset;
  };

  FASTBN_DEVICE Item load(const Vec16* where) const {
    Item item;
    item.grad_out = load_vec16(where);
    item.x = load_vec16(where + plan_.stream.vectors_per_split);
    return item;
  }
  FASTBN_DEVICE Vec16 load_residual(const Vec16* where) const {
    return load_vec16(where + 2 * plan_.stream.vectors_per_split);
  }

  // Sums grad_z where it is grad_out or 0.
  template <GradSource source, bool has_residual, class Work>
  FASTBN_DEVICE void sum(const Work& work) const {
    Consumer& consumer = work.consumer;
    Affine<float> affine[channels];
    float pivot[1][channels];
    if constexpr (source == GradSource::relu) consumer.load_affine(work.position, BackwardFields::sum_affine, affine);
    consumer.load_fields(work.position, BackwardFields::sum_pivot, pivot);
    // The bits of the mask are loaded a chunk ahead, since they come from memory and not from the ring.
    uint32_t bits[Consumer::unroll] = {};
    int next = consumer.thread();
    const auto fetch = [&](int u) {
      bits[u] = 0;
      if (next < work.tiles.vectors) {
        bits[u] = mask_bits_of<T>(params_.mask, work.offset + consumer.walk.offset);
        next += consumer.threads();
        consumer.next(consumer.walk);
      }
    };
    if constexpr (source == GradSource::mask) {
      consumer.walk.restart();
      if (consumer.has_vectors(work.width)) {
        FASTBN_UNROLL
        for (int u = 0; u < Consumer::unroll; ++u) fetch(u);
      }
    }
    // The pivot of the elements serves half types, and is in a register already where relu is recomputed.
    constexpr bool has_own_pivot = source != GradSource::relu || sizeof(T) == sizeof(float);
    float sums[n] = {}, shifted[n] = {};
    // hot loop: sums
    consumer.template sum_tile<source == GradSource::relu ? rolled_batch : batch>(
        work.position, work.width,
        [&](const Vec16* where, int u) {
          Item item = load(where);
          if constexpr (has_residual) item.residual = load_residual(where);
          if constexpr (source == GradSource::mask) {
            item.mask = bits[u];
            fetch(u);
          }
          return item;
        },
        [&](Vec16* where, const Item& item) {
          float grad[size];
          FASTBN_UNROLL
          for (int i = 0; i < size; ++i) {
            const float x = element_of<T>(item.x, i);
            grad[i] = element_of<T>(item.grad_out, i);
            if constexpr (source == GradSource::mask) grad[i] = item.mask >> i & 1 ? grad[i] : 0;
            if constexpr (source == GradSource::relu) {
              float z = affine[i % channels].apply(x);
              if constexpr (has_residual) z += element_of<T>(item.residual, i);
              grad[i] = activation_backward(Relu(), z, grad[i], 0.0f);
            }
            sums[i % n] += grad[i];
            shifted[i % n] += grad[i] * (x - (has_own_pivot ? pivot[0][i % channels] : affine[i % channels].pivot));
          }
          if constexpr (source != GradSource::grad_out) store_vec16(where, vec16_of<T>(grad));
        });
    // end of hot loop
    consumer.publish(work.position, sums, shifted);
  }

  template <class Work>
  FASTBN_DEVICE void sum_by_formula(const Work& work) const {
    Consumer& consumer = work.consumer;
    float sums[n] = {}, shifted[n] = {};
    consumer.walk.restart();
    consumer.template sum_tile<0>(
        work.position, work.width, [&](const Vec16* where, int) { return load_all(consumer, where); },
        [&](Vec16*, const Item& item) {
          float grad[size], pivot[1][channels];
          grad_z(work, item, BackwardFields::sum_affine, grad);
          consumer.load_fields(work.position, BackwardFields::sum_pivot, pivot);
          FASTBN_UNROLL
          for (int i = 0; i < size; ++i) {
            sums[i % n] += grad[i];
            shifted[i % n] += grad[i] * (element_of<T>(item.x, i) - pivot[0][i % channels]);
          }
        });
    consumer.publish(work.position, sums, shifted);
  }

  // Writes a tile whose grad_z is in the ring.
  template <bool has_grad_residual, class Work>
  FASTBN_DEVICE void write(const Work& work) const {
    Consumer& consumer = work.consumer;
    GradAffine<float> affine[channels];
    load_grad_affine(work, affine);
    Vec16* const grad_input = at_tile(params_.grad_input, work.offset);
    Vec16* const grad_residual = has_grad_residual ? at_tile(params_.grad_residual, work.offset) : nullptr;
    consumer.walk.restart();
    // hot loop: write
    consumer.template write_tile<rolled_batch>(
        work.position, work.width, [&](const Vec16* where, int) { return load(where); },
        [&](Vec16*, const Item& item) {
          float grad[size];
          FASTBN_UNROLL
          for (int i = 0; i < size; ++i) {
            grad[i] = affine[i % channels].apply(element_of<T>(item.grad_out, i), element_of<T>(item.x, i));
          }
          if constexpr (has_grad_residual) store_vec16(grad_residual + consumer.walk.offset, item.grad_out);
          store_vec16(grad_input + consumer.walk.offset, vec16_of<T>(grad));
          consumer.next(consumer.walk);
        });
    // end of hot loop
  }

  template <class Work>
  FASTBN_DEVICE void write_in_general(const Work& work, bool is_far) const {
    Consumer& consumer = work.consumer;
    consumer.walk.restart();
    consumer.template write_tile<0>(
        work.position, work.width, [&](const Vec16* where, int) { return load_all(consumer, where); },
        [&](Vec16*, const Item& item) {
          float grad[size];
          if (source() == GradSource::formula) {
            grad_z(work, item, BackwardFields::affine, grad);
          } else {
            FASTBN_UNROLL
            for (int i = 0; i < size; ++i) grad[i] = element_of<T>(item.grad_out, i);
          }
          const int64_t offset = work.offset + item.offset;
          if (params_.grad_residual)
            store_vec16(static_cast<Vec16*>(params_.grad_residual) + offset, vec16_of<T>(grad));
          GradAffine<float> g[channels];
          load_grad_affine(work, g);
          FASTBN_UNROLL
          for (int i = 0; i < size; ++i) {
            const float x = element_of<T>(item.x, i);
            grad[i] = is_far ? g[i % channels].apply_far(grad[i], x) : g[i % channels].apply(grad[i], x);
          }
          store_vec16(static_cast<Vec16*>(params_.grad_input) + offset, vec16_of<T>(grad));
        });
  }

  FASTBN_DEVICE Item load_all(Consumer& consumer, const Vec16* where) const {
    Item item = load(where);
    // A vector that is undefined without a residual would hold registers throughout the kernel.
    item.residual = plan_.stream.tensors > 2 ? load_residual(where) : Vec16{};
    item.offset = consumer.walk.offset;
    consumer.next(consumer.walk);
    return item;
  }

  // Computes grad_z by the activation's formula, or for leaky_relu by its mask. Coefficients are loaded where they are
  // needed, from `affine_field` on: those of several channels do not fit in registers beside a long formula.
  template <class Work>
  FASTBN_DEVICE void grad_z(const Work& work, const Item& item, int affine_field, float (&grad)[size]) const {
    FASTBN_UNROLL
    for (int i = 0; i < size; ++i) grad[i] = element_of<T>(item.grad_out, i);
    if (params_.mask) {
      const uint32_t bits = mask_bits_of<T>(params_.mask, work.offset + item.offset);
      FASTBN_UNROLL
      for (int i = 0; i < size; ++i) {
        grad[i] = activation_backward_masked(params_.activation, (bits >> i & 1) != 0, grad[i], param());
      }
      return;
    }
    Affine<float> affine[channels];
    work.consumer.load_affine(work.position, affine_field, affine);
    float z[size];
    FASTBN_UNROLL
    for (int i = 0; i < size; ++i) {
      z[i] = affine[i % channels].apply(element_of<T>(item.x, i));
      if (plan_.stream.tensors > 2) z[i] += element_of<T>(item.residual, i);
    }
    activate_backward(params_.activation, param(), z, grad);
  }

  // Returns the same for one element.
  FASTBN_DEVICE float element_grad(const Vec16* where, int64_t offset, int i, float x,
                                   const Affine<float>& affine) const {
    const float grad = load_element<T>(where, i);
    if (params_.mask) {
      const uint32_t bits = mask_bits_of<T>(params_.mask, offset);
      return activation_backward_masked(params_.activation, (bits >> i & 1) != 0, grad, param());
    }
    float z = affine.apply(x);
    if (plan_.stream.tensors > 2) z += load_element<T>(where + 2 * plan_.stream.vectors_per_split, i);
    return activation_backward(params_.activation, z, grad, param());
  }

  FASTBN_DEVICE GradSource source() const { return source_of(params_); }
  FASTBN_DEVICE float param() const { return params_.activation_param.template in<float>(); }

  const BackwardParams& params_;
  const Plan& plan_;
};

template <class T, Kernel kernel>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(stream_threads, 1)
    stream_backward_kernel(BackwardParams params, Plan plan, BackwardMap map, device::Message16* messages) {
  run_stream<StreamBackward<T, kernel>>(params, plan, map, messages);
}

}  // namespace

cudaError_t launch_stream_backward(const BackwardParams& params, const Plan& plan, void* messages,
                                   cudaStream_t stream) {
  if (!params.grad_input) return cudaErrorInvalidValue;
  return dispatch_stream(params.dtype, plan, [&]<class T, Kernel kernel>() {
    return device::launch(&stream_backward_kernel<T, kernel>, stream_shape<StreamBackward<T, kernel>>(params, plan),
                          stream, params, plan, BackwardMap(plan), static_cast<device::Message16*>(messages));
  });
}

}  // namespace fastbn::cuda
