// The backward ops: gradients of training and evaluation, the input gradient with given sums, and the sums alone.
#include <algorithm>
#include <cmath>
#include <optional>

#include "cpu/coefficients.h"
#include "cpu/kernels/kernels.h"
#include "cpu/launch.h"
#include "cpu/output.h"
#include "cpu/panels.h"
#include "cpu/phases.h"
#include "cpu/workspace.h"

namespace fastbn::cpu {
namespace {

// Returns whether sums in float are as good as those in double: they neither overflowed nor underflowed.
bool resolves(const Sums& sums) {
  return std::isfinite(sums.first) && std::isfinite(sums.second) &&
         (std::fabs(sums.second) >= 1e-25 || sums.second == 0);
}

// Minimum count for comparing x with a threshold. Finding a channel's interval takes as long as it saves on 50
// elements: the backward of bfloat16 is 0.88 times as fast with it for 32x4096, and 1.0 times for 256x84 (EPYC 9004).
constexpr int64_t min_count_compared = 64;

// A backward op on the first `channels` channels. It is also the reduction that run_phases expects.
template <class A>
class Backward {
 public:
  Backward(const BackwardParams& params, int64_t channels, const Threads& threads)
      : params_(params),
        channels_(channels),
        threads_(threads),
        table_(kernels(params.dtype)),
        partition_(params.layout, params.dtype, channels),
        pivots_(size_t(partition_.entries() + table_padding)),
        relu_(partition_, compares(params) ? table_.relu_intervals : nullptr),
        grad_affine_(partition_, table_.column_planes),
        is_far_(std::is_same_v<A, float> && std::any_of(params.inv_std, params.inv_std + channels, is_far_from_one)) {
    if (params.activation != Activation::none && !params.mask) affine_.emplace(partition_, table_.column_planes);
  }

  void run(bool non_temporal) {
    non_temporal_ = non_temporal;
    const bool frozen = params_.statistics == Statistics::running;
    const bool wants_sums = params_.grad_weight.defined() || params_.grad_bias.defined();
    const bool applies = params_.grad_input || params_.grad_residual;
    const bool reduces = wants_sums || (params_.statistics == Statistics::batch && params_.grad_input);
    const bool in_double = reduces && sums_in_double();
    writes_with_sums_ = frozen && wants_sums && writes_with_sums(in_double);

    auto finish_chunk = [&](Chunk& chunk) {
      const int64_t first = chunk.first, channels = chunk.channels;
      double count = double(params_.layout.count());
      load_statistics(chunk);
      if (reduces) {
        table_.grad_sums(pivots_.data(), totals_->of_channels(), chunk);
        if (params_.grad_bias.defined()) params_.grad_bias.store(first, channels, chunk.sum_grad);
        if (params_.grad_weight.defined()) params_.grad_weight.store(first, channels, chunk.sum_grad_xhat);
      } else if (params_.statistics == Statistics::given) {
        std::copy_n(params_.sum_grad + first, channels, chunk.sum_grad);
        std::copy_n(params_.sum_grad_xhat + first, channels, chunk.sum_grad_xhat);
        count = *params_.count;
      } else {
        std::fill_n(chunk.sum_grad, channels, 0.0);
        std::fill_n(chunk.sum_grad_xhat, channels, 0.0);
      }
      if (!writes_with_sums_) set_grad_affine(chunk, count);
    };
    auto finish = [&](int64_t begin, int64_t end) {
      for_each_chunk(begin, end, finish_chunk);
      if (!writes_with_sums_) grad_affine_.repeat(begin, end);
    };
    auto apply = [&](const Tile& tile, const MaskTile& mask_tile, int64_t channel) {
      if (!applies || writes_with_sums_) return;
      (partition_.in_columns() ? table_.column_input_grad : table_.channel_input_grad)(args_from(channel, frozen), tile,
                                                                                       mask_tile);
    };
    if (reduces)
      reduce_then(in_double, finish, apply);
    else
      run_last_phase(
          partition_, threads_,
          [&](int64_t begin, int64_t end) {
            prepare(begin, end);
            finish(begin, end);
          },
          apply);
  }

  void run_sums() {
    auto finish = [&](int64_t begin, int64_t end) {
      for_each_chunk(begin, end, [&](Chunk& chunk) {
        load_statistics(chunk);
        table_.grad_sums(pivots_.data(), totals_->of_channels(), chunk);
        std::copy_n(chunk.sum_grad, chunk.channels, params_.sum_grad + chunk.first);
        std::copy_n(chunk.sum_grad_xhat, chunk.channels, params_.sum_grad_xhat + chunk.first);
      });
    };
    reduce_then(sums_in_double(), finish, [](const Tile&, const MaskTile&, int64_t) {});
  }

  // The interface of a reduction.

  void prepare(int64_t begin, int64_t end) {
    for_each_chunk(begin, end, [&](Chunk& chunk) {
      load_statistics(chunk);
      table_.grad_pivots(chunk, pivots_.data());
      if (writes_with_sums_) {
        std::fill_n(chunk.sum_grad, chunk.channels, 0.0);
        std::fill_n(chunk.sum_grad_xhat, chunk.channels, 0.0);
        set_grad_affine(chunk, double(params_.layout.count()));
      }
      if (!affine_) return;
      params_.weight.load_or(chunk.first, chunk.channels, 1, chunk.weight);
      params_.bias.load_or(chunk.first, chunk.channels, 0, chunk.bias);
      ChunkCoefficients<A, 3> coefficients;
      table_.affine(chunk, coefficients);
      affine_->set(chunk, coefficients);
      if constexpr (std::is_same_v<A, float>) relu_.set(chunk, coefficients);
    });
    if (affine_) affine_->repeat(begin, end);
    repeat_columns(pivots_.data(), partition_, begin, end);
    relu_.repeat(begin, end);
    if (writes_with_sums_) grad_affine_.repeat(begin, end);
  }

  void reduce(int64_t i, Precision precision) {
    const bool writes = writes_with_sums_ && precision == Precision::fast, in_double = totals_->in_double(precision);
    const auto column_sums = writes      ? table_.column_frozen_grad
                             : in_double ? table_.column_grad_sums_in_double
                                         : table_.column_grad_sums;
    const auto channel_sums = writes      ? table_.channel_frozen_grad
                              : in_double ? table_.channel_grad_sums_in_double
                                          : table_.channel_grad_sums;
    GradArgs args = args_from(partition_.first_channel(i), true);
    if (!writes) args.grad_input = args.grad_residual = nullptr;
    (partition_.in_columns() ? column_sums : channel_sums)(args, partition_.tile(i), partition_.mask_tile(i),
                                                           totals_->of_tile(i));
  }

  bool merge(int64_t begin, int64_t end, Precision precision) {
    return totals_->merge(begin, end, precision, resolves);
  }

 private:
  template <class Finish, class Apply>
  void reduce_then(bool in_double, Finish&& finish, Apply&& apply) {
    totals_.emplace(partition_, in_double);
    run_phases(partition_, threads_, *this, finish, apply);
  }

  // Returns whether all sums are taken in double. Only bfloat16 may be summed in float.
  bool sums_in_double() const {
    return params_.dtype != DType::bfloat16 || params_.layout.count() < min_count_in_float ||
           std::any_of(params_.inv_std, params_.inv_std + channels_, loses_underflowed_products);
  }

  // Returns whether to write the input gradient of frozen statistics, which needs no sums, in the loop that sums: each
  // tensor is read once, and stores overlap with sums. Relative to two loops it takes 0.5 to 0.9 of the time for
  // float32 and 0.6 to 1.05 for bfloat16. Short runs of tensors out of cache, where it takes 1.0 to 1.4, are cheaper to
  // write in memory order (EPYC 9005).
  bool writes_with_sums(bool in_double) const {
    const int64_t bytes = params_.layout.numel() * element_size(params_.dtype);
    return params_.activation == Activation::none && params_.grad_input && !params_.grad_residual &&
           (partition_.in_columns() || partition_.goes_by_group() || bytes < min_out_of_cache_bytes) &&
           (params_.dtype != DType::bfloat16 || !in_double);
  }

  // Returns whether to find relu's derivative by comparing x with a threshold. The comparison is wrong for NaN. Only
  // with frozen statistics can that happen: others are assumed to be of this input, so that a NaN in x makes all of z
  // NaN.
  static bool compares(const BackwardParams& params) {
    return params.activation == Activation::relu && !params.mask && !params.residual &&
           params.statistics != Statistics::running && params.layout.count() >= min_count_compared;
  }

  GradArgs args_from(int64_t first, bool frozen) const {
    return {params_.grad_out,
            params_.input,
            params_.residual,
            params_.mask,
            params_.activation,
            params_.activation_param.in_double,
            pivots_.data() + first,
            affine_ ? affine_->arrays(first) : grad_affine_.pivots(first),
            grad_affine_.arrays(first, frozen),
            params_.grad_input,
            params_.grad_residual,
            non_temporal_,
            relu_.arrays(first),
            is_far_};
  }

  void set_grad_affine(Chunk& chunk, double count) {
    params_.weight.load_or(chunk.first, chunk.channels, 1, chunk.weight);
    ChunkCoefficients<A, 5> coefficients;
    table_.grad_affine(chunk, count, is_far_, coefficients);
    grad_affine_.set(chunk, coefficients);
  }

  void load_statistics(Chunk& chunk) const {
    std::copy_n(params_.mean + chunk.first, chunk.channels, chunk.mean);
    std::copy_n(params_.inv_std + chunk.first, chunk.channels, chunk.inv_std);
  }

  const BackwardParams& params_;
  int64_t channels_;
  const Threads& threads_;
  const Kernels& table_;
  Partition partition_;
  Workspace<A> pivots_;
  std::optional<AffineTable<A>> affine_;  // to recompute z, if the derivative needs it
  ReluIntervalTable relu_;
  GradAffineTable<A> grad_affine_;
  bool is_far_;  // true if it is for any channel
  std::optional<Totals> totals_;
  bool non_temporal_ = false, writes_with_sums_ = false;
};

template <class A>
void backward_as(const BackwardParams& params, const Threads& threads) {
  const int64_t bytes = params.layout.numel() * element_size(params.dtype);
  const int64_t tensors =
      2 + (params.residual != nullptr) + (params.grad_input != nullptr) + (params.grad_residual != nullptr);
  const bool non_temporal = prepare_outputs({params.grad_input, params.grad_residual}, bytes, tensors * bytes,
                                            kernels(params.dtype).min_streamed_bytes_per_thread * threads.count);
  for_each_panel(params, threads, [&](const BackwardParams& panel, int64_t channels, const Threads& its_threads) {
    Backward<A>(panel, channels, its_threads).run(non_temporal);
  });
}

template <class A>
void grad_sums_as(const BackwardParams& params, const Threads& threads) {
  for_each_panel(params, threads, [](const BackwardParams& panel, int64_t channels, const Threads& its_threads) {
    Backward<A>(panel, channels, its_threads).run_sums();
  });
}

// Writes the sums over no elements.
void write_zeros(const BackwardParams& params) {
  for (int64_t c = 0; c < params.layout.channels; ++c) {
    if (params.grad_weight.defined()) params.grad_weight.store(c, 0);
    if (params.grad_bias.defined()) params.grad_bias.store(c, 0);
  }
}

}  // namespace

void backward(const BackwardParams& params, const Threads& threads) {
  if (params.layout.count() == 0)
    write_zeros(params);
  else if (params.dtype == DType::float64)
    backward_as<double>(params, threads);
  else
    backward_as<float>(params, threads);
}

void grad_sums(const BackwardParams& params, const Threads& threads) {
  if (params.layout.count() == 0)
    for (int64_t c = 0; c < params.layout.channels; ++c) params.sum_grad[c] = params.sum_grad_xhat[c] = 0;
  else if (params.dtype == DType::float64)
    grad_sums_as<double>(params, threads);
  else
    grad_sums_as<float>(params, threads);
}

}  // namespace fastbn::cpu
