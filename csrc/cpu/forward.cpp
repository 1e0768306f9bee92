// Training forward, evaluation forward, normalise with given statistics, and statistics alone.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/output.h"
#include "cpu/panels.h"
#include "cpu/phases.h"
#include "math/moments.h"

namespace fastbn::cpu {
namespace {

// Whether the variance that sums in float give is as good as these: they neither overflowed nor vanished, and the pivot
// lies so near the mean that subtracting its share does not multiply their relative error by more than 8.
bool resolves(const Sums& sums, double count) {
  const double m2 = sums.second - sums.first * sums.first / count;
  return std::isfinite(sums.second) && sums.second <= 8 * m2 && (sums.second >= 1e-30 || (sums.first == 0 && sums.second == 0));
}

// The reduction of a forward op: partial sums about an element of each channel, then their moments.
template <class A>
class Statistician {
 public:
  Statistician(const ForwardParams& params, const Partition& partition)
      : params_(params),
        partition_(partition),
        table_(kernels(params.dtype)),
        pivots_(size_t(partition.entries())),
        totals_(partition, in_double(params)) {}

  void prepare(int64_t begin, int64_t end) {
    table_.pivots(params_.input, params_.layout, begin, end, pivots_.data());
    repeat_columns(pivots_.data(), partition_, begin, end);
  }

  void reduce(int64_t i, Look look) {
    const bool in_double = totals_.in_double(look);
    const auto column_sums = in_double ? table_.column_sums_in_double : table_.column_sums;
    const auto channel_sums = in_double ? table_.channel_sums_in_double : table_.channel_sums;
    (partition_.in_columns() ? column_sums : channel_sums)(
        params_.input, partition_.block(i), &pivots_[size_t(partition_.first_channel(i))], totals_.of_block(i, look));
  }

  bool merge(int64_t begin, int64_t end, Look look) {
    return totals_.merge(begin, end, look,
                         [&](const Sums& sums) { return resolves(sums, double(params_.layout.count())); });
  }

  Moments moments(int64_t channel) const {
    const Sums sums = totals_.of_channel(channel);
    return Moments::from_shifted(double(params_.layout.count()), double(pivots_[size_t(channel)]), sums.first,
                                 sums.second);
  }

  // What rounding the mean lost, where elements show it.
  double rest_of_mean(int64_t channel) const {
    if constexpr (!std::is_same_v<A, double>) return 0;
    return Moments::rest_of_mean(double(params_.layout.count()), double(pivots_[size_t(channel)]),
                                 totals_.of_channel(channel).first);
  }

 private:
  // Differences of halves and their squares have so few digits that float rounds little of however few.
  static bool in_double(const ForwardParams& params) {
    return params.dtype == DType::float64 ||
           (params.dtype == DType::float32 && params.layout.count() < least_count_in_float);
  }

  const ForwardParams& params_;
  const Partition& partition_;
  const Kernels& table_;
  std::vector<A> pivots_;
  Totals totals_;
};

void update_running(const ChannelVector& running, int64_t first, int64_t count, const double* batch, double factor) {
  if (!running.defined()) return;
  double values[chunk_channels];
  running.load_or(first, count, 0, values);
  for (int64_t i = 0; i < count; ++i) values[i] = running_average(values[i], batch[i], factor);
  running.store(first, count, values);
}

// Of the first `channels`, where `factor` is what the batch counts for in the running statistics.
template <class A>
void forward_channels(const ForwardParams& params, int64_t channels, const Threads& threads, double factor,
                      bool past_caches) {
  const Kernels& table = kernels(params.dtype);
  const Partition partition(params.layout, params.dtype, channels);
  const bool batch = params.statistics == Statistics::batch;
  AffineTable<A> affine(partition, table.column_planes);
  std::optional<Statistician<A>> statistician;
  if (batch) statistician.emplace(params, partition);

  auto finish_chunk = [&](int64_t first, int64_t count) {
    double mean[chunk_channels], inv_std[chunk_channels], var[chunk_channels], mean_rest[chunk_channels] = {};
    if (batch) {
      double unbiased_var[chunk_channels];
      for (int64_t i = 0; i < count; ++i) {
        const Moments moments = statistician->moments(first + i);
        mean[i] = moments.mean;
        mean_rest[i] = statistician->rest_of_mean(first + i);
        var[i] = moments.var();
        unbiased_var[i] = moments.unbiased_var();
      }
      update_running(params.running_mean, first, count, mean, factor);
      update_running(params.running_var, first, count, unbiased_var, factor);
    } else if (params.statistics == Statistics::running) {
      params.running_mean.load_or(first, count, 0, mean);
      params.running_var.load_or(first, count, 0, var);
    } else {
      std::copy_n(params.mean + first, count, mean);
      std::copy_n(params.inv_std + first, count, inv_std);
    }
    if (params.statistics != Statistics::given) {
      for (int64_t i = 0; i < count; ++i) inv_std[i] = inv_std_of(var[i], params.eps);
      if (params.mean) {
        std::copy_n(mean, count, params.mean + first);
        std::copy_n(inv_std, count, params.inv_std + first);
      }
    }
    double weight[chunk_channels], bias[chunk_channels];
    params.weight.load_or(first, count, 1, weight);
    params.bias.load_or(first, count, 0, bias);
    for (int64_t i = 0; i < count; ++i)
      affine.set(first + i, Affine<A>::make(mean[i], inv_std[i], weight[i], bias[i], mean_rest[i]));
  };
  auto finish = [&](int64_t begin, int64_t end) {
    for_each_chunk(begin, end, finish_chunk);
    affine.repeat(begin, end);
  };
  auto apply = [&](const Block& block, const MaskBlock& mask_block, int64_t channel) {
    const NormalizeArgs args{params.input,      params.residual,        params.output, params.mask,
                             params.activation, affine.arrays(channel), past_caches};
    (partition.in_columns() ? table.column_normalize : table.channel_normalize)(args, block, mask_block);
  };
  if (batch)
    run_phases(partition, threads, *statistician, finish, apply);
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
  const bool past_caches = prepare_outputs({params.output}, bytes, (params.residual ? 3 : 2) * bytes,
                                           kernels(params.dtype).streamed_bytes_a_thread * threads.count);
  for_each_panel(params, threads, [&](const ForwardParams& panel, int64_t channels, const Threads& its_threads) {
    forward_channels<A>(panel, channels, its_threads, factor, past_caches);
  });
}

template <class A>
void channel_stats_of(const ForwardParams& params, int64_t channels, const Threads& threads) {
  const Partition partition(params.layout, params.dtype, channels);
  Statistician<A> statistician(params, partition);
  auto finish = [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Moments moments = statistician.moments(c);
      params.mean[c] = moments.mean;
      params.var[c] = moments.var();
    }
  };
  run_phases(partition, threads, statistician, finish, [](const Block&, const MaskBlock&, int64_t) {});
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
