// The forward ops: training, evaluation, normalisation with given statistics, and the statistics alone.
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
#include "math/moments.h"

namespace fastbn::cpu {
namespace {

// Returns whether sums in float give a variance as good as sums in double: they neither overflowed nor underflowed, and
// the pivot is so near the mean that correcting for it multiplies their relative error by at most 8.
bool resolves(const Sums& sums, double count) {
  const double m2 = sums.second - sums.first * sums.first / count;
  return std::isfinite(sums.second) && sums.second <= 8 * m2 &&
         (sums.second >= 1e-30 || (sums.first == 0 && sums.second == 0));
}

// The reduction of a forward op: partial sums about a pivot per channel, then the moments of the channels.
template <class A>
class MomentReducer {
 public:
  MomentReducer(const ForwardParams& params, const Partition& partition)
      : params_(params),
        partition_(partition),
        table_(kernels(params.dtype)),
        pivots_(size_t(partition.entries() + table_padding)),
        totals_(partition, in_double(params)) {}

  void prepare(int64_t begin, int64_t end) {
    table_.pivots(params_.input, params_.layout, begin, end, pivots_.data());
    repeat_columns(pivots_.data(), partition_, begin, end);
  }

  void reduce(int64_t i, Precision precision) {
    const bool in_double = totals_.in_double(precision);
    const auto column_sums = in_double ? table_.column_sums_in_double : table_.column_sums;
    const auto channel_sums = in_double ? table_.channel_sums_in_double : table_.channel_sums;
    (partition_.in_columns() ? column_sums : channel_sums)(
        params_.input, partition_.tile(i), &pivots_[size_t(partition_.first_channel(i))], totals_.of_tile(i));
  }

  bool merge(int64_t begin, int64_t end, Precision precision) {
    return totals_.merge(begin, end, precision,
                         [&](const Sums& sums) { return resolves(sums, double(params_.layout.count())); });
  }

  void set_moments(Chunk& chunk) const {
    table_.moments(pivots_.data(), totals_.of_channels(), double(params_.layout.count()), chunk);
  }

 private:
  // Returns whether fast sums are taken in double too. Half types never need it: their differences and squares have so
  // few digits that float rounds little, however few terms there are.
  static bool in_double(const ForwardParams& params) {
    return params.dtype == DType::float64 ||
           (params.dtype == DType::float32 && params.layout.count() < min_count_in_float);
  }

  const ForwardParams& params_;
  const Partition& partition_;
  const Kernels& table_;
  Workspace<A> pivots_;
  Totals totals_;
};

void update_running(const ChannelVector& running, const Chunk& chunk, const double* batch, double factor) {
  if (!running.defined()) return;
  double values[chunk_channels];
  running.load_or(chunk.first, chunk.channels, 0, values);
  for (int64_t i = 0; i < chunk.channels; ++i) values[i] = running_average(values[i], batch[i], factor);
  running.store(chunk.first, chunk.channels, values);
}

// Runs a forward op on the first `channels` channels; `factor` is the batch's weight in the running statistics.
template <class A>
void forward_channels(const ForwardParams& params, int64_t channels, const Threads& threads, double factor,
                      bool non_temporal) {
  const Kernels& table = kernels(params.dtype);
  const Partition partition(params.layout, params.dtype, channels);
  const bool batch = params.statistics == Statistics::batch;
  AffineTable<A> affine(partition, table.column_planes);
  std::optional<MomentReducer<A>> reducer;
  if (batch) reducer.emplace(params, partition);

  auto finish_chunk = [&](Chunk& chunk) {
    const int64_t first = chunk.first, channels = chunk.channels;
    if (batch) {
      reducer->set_moments(chunk);
      update_running(params.running_mean, chunk, chunk.mean, factor);
      update_running(params.running_var, chunk, chunk.unbiased_var, factor);
    } else if (params.statistics == Statistics::running) {
      params.running_mean.load_or(first, channels, 0, chunk.mean);
      params.running_var.load_or(first, channels, 0, chunk.var);
    } else {
      std::copy_n(params.mean + first, channels, chunk.mean);
      std::copy_n(params.inv_std + first, channels, chunk.inv_std);
    }
    if (params.statistics != Statistics::given) {
      table.inv_std(params.eps, chunk);
      if (params.mean) {
        std::copy_n(chunk.mean, channels, params.mean + first);
        std::copy_n(chunk.inv_std, channels, params.inv_std + first);
      }
    }
    params.weight.load_or(first, channels, 1, chunk.weight);
    params.bias.load_or(first, channels, 0, chunk.bias);
    ChunkCoefficients<A, 3> coefficients;
    table.affine(chunk, coefficients);
    affine.set(chunk, coefficients);
  };
  auto finish = [&](int64_t begin, int64_t end) {
    for_each_chunk(begin, end, finish_chunk);
    affine.repeat(begin, end);
  };
  auto apply = [&](const Tile& tile, const MaskTile& mask_tile, int64_t channel) {
    const NormalizeArgs args{params.input,           params.residual,
                             params.output,          params.mask,
                             params.activation,      params.activation_param.in_double,
                             affine.arrays(channel), non_temporal};
    (partition.in_columns() ? table.column_normalize : table.channel_normalize)(args, tile, mask_tile);
  };
  if (batch)
    run_phases(partition, threads, *reducer, finish, apply);
  else
    run_last_phase(partition, threads, finish, apply);
}

template <class A>
void forward_as(const ForwardParams& params, const Threads& threads) {
  double factor = 0;
  if (params.statistics == Statistics::batch) {
    if (params.num_batches_tracked) ++*params.num_batches_tracked;
    factor = averaging_factor(params.has_momentum, params.momentum,
                              params.num_batches_tracked ? *params.num_batches_tracked : 0);
  }
  const int64_t bytes = params.layout.numel() * element_size(params.dtype);
  const bool non_temporal = prepare_outputs({params.output}, bytes, (params.residual ? 3 : 2) * bytes,
                                            kernels(params.dtype).min_streamed_bytes_per_thread * threads.count);
  for_each_panel(params, threads, [&](const ForwardParams& panel, int64_t channels, const Threads& its_threads) {
    forward_channels<A>(panel, channels, its_threads, factor, non_temporal);
  });
}

template <class A>
void channel_stats_of(const ForwardParams& params, int64_t channels, const Threads& threads) {
  const Partition partition(params.layout, params.dtype, channels);
  MomentReducer<A> reducer(params, partition);
  auto finish = [&](int64_t begin, int64_t end) {
    for_each_chunk(begin, end, [&](Chunk& chunk) {
      reducer.set_moments(chunk);
      std::copy_n(chunk.mean, chunk.channels, params.mean + chunk.first);
      std::copy_n(chunk.var, chunk.channels, params.var + chunk.first);
    });
  };
  run_phases(partition, threads, reducer, finish, [](const Tile&, const MaskTile&, int64_t) {});
}

template <class A>
void channel_stats_as(const ForwardParams& params, const Threads& threads) {
  for_each_panel(params, threads, channel_stats_of<A>);
}

}  // namespace

void forward(const ForwardParams& params, const Threads& threads) {
  if (params.layout.count() == 0) {
    if (params.statistics == Statistics::batch && params.num_batches_tracked) ++*params.num_batches_tracked;
    for (int64_t c = 0; c < params.layout.channels && params.statistics != Statistics::given && params.mean; ++c) {
      const bool running = params.statistics == Statistics::running;
      params.mean[c] = running ? params.running_mean.load(c) : 0;
      params.inv_std[c] = inv_std_of(running ? params.running_var.load(c) : 0, params.eps);
    }
  } else if (params.dtype == DType::float64) {
    forward_as<double>(params, threads);
  } else {
    forward_as<float>(params, threads);
  }
}

void channel_stats(const ForwardParams& params, const Threads& threads) {
  if (params.layout.count() == 0) {
    for (int64_t c = 0; c < params.layout.channels; ++c) params.mean[c] = params.var[c] = 0;
  } else if (params.dtype == DType::float64) {
    channel_stats_as<double>(params, threads);
  } else {
    channel_stats_as<float>(params, threads);
  }
}

}  // namespace fastbn::cpu
