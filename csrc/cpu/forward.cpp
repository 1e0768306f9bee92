// Training forward, evaluation forward, normalise with given statistics, and statistics alone.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/output.h"
#include "cpu/partition.h"
#include "math/moments.h"

namespace fastbn::cpu {
namespace {

// Whether the variance that sums in float give is as good as these: they neither overflowed nor vanished, and the pivot
// lies so near the mean that subtracting its share does not multiply their relative error by more than 8.
bool resolves(const Sums& sums, double count) {
  const double m2 = sums.second - sums.first * sums.first / count;
  return std::isfinite(sums.second) && sums.second <= 8 * m2 && (sums.second >= 1e-30 || sums.first == 0);
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
        partials_(size_t(2 * partition.partials())) {}

  void prepare(int64_t channel) {
    const A pivot = A(table_.pivot(params_.input, params_.layout, channel));
    for (size_t j = size_t(channel); j < pivots_.size(); j += size_t(params_.layout.channels)) pivots_[j] = pivot;
  }

  void reduce(int64_t i, Look look) {
    const Block block = partition_.block(i);
    if (partition_.in_columns()) {
      const ColumnSums sums = partition_.column_sums(i, partials_.data());
      if (look == Look::second) std::fill_n(sums.first, 2 * partition_.width(), 0.0);
      (look == Look::first ? table_.column_sums : table_.column_sums_in_double)(params_.input, block, pivots_.data(),
                                                                                sums);
    } else {
      const Sums sums = (look == Look::first ? table_.channel_sums : table_.channel_sums_in_double)(
          params_.input, block, &pivots_[size_t(partition_.first_channel(i))]);
      partials_[size_t(2 * i)] = sums.first;
      partials_[size_t(2 * i + 1)] = sums.second;
    }
  }

  // Nothing if a second look is needed.
  std::optional<Moments> moments(int64_t channel, Look look) const {
    const double count = double(params_.layout.count());
    const Sums total = partition_.sum_partials(channel, partials_.data());
    if (look == Look::first && element_size(params_.dtype) == 2 && !resolves(total, count)) return std::nullopt;
    return Moments::from_shifted(count, double(pivots_[size_t(channel)]), total.first, total.second);
  }

 private:
  const ForwardParams& params_;
  const Partition& partition_;
  const Kernels& table_;
  std::vector<A> pivots_;
  std::vector<double> partials_;
};

void update_running_stats(const ForwardParams& params, int64_t channel, const Moments& moments, double factor) {
  if (params.running_mean.defined())
    params.running_mean.store(channel, running_average(params.running_mean.load(channel), moments.mean, factor));
  if (params.running_var.defined())
    params.running_var.store(channel,
                             running_average(params.running_var.load(channel), moments.unbiased_var(), factor));
}

template <class A>
void forward_as(const ForwardParams& params, const Threads& threads) {
  const Layout& layout = params.layout;
  const Kernels& table = kernels(params.dtype);
  const Partition partition(layout);
  const bool batch = params.statistics == Statistics::batch;
  AffineTable<A> affine(partition.entries());
  std::optional<Statistician<A>> statistician;
  if (batch) statistician.emplace(params, partition);

  double factor = 0;
  if (batch) {
    if (params.num_batches_tracked) ++*params.num_batches_tracked;
    factor = averaging_factor(params.has_momentum, params.momentum,
                              params.num_batches_tracked ? *params.num_batches_tracked : 0);
  }

  auto finish = [&](int64_t channel, Look look) {
    double mean, inv_std;
    if (batch) {
      const std::optional<Moments> moments = statistician->moments(channel, look);
      if (!moments) return false;
      mean = moments->mean;
      inv_std = inv_std_of(moments->var(), params.eps);
      update_running_stats(params, channel, *moments, factor);
    } else if (params.statistics == Statistics::running) {
      mean = params.running_mean.load(channel);
      inv_std = inv_std_of(params.running_var.load(channel), params.eps);
    } else {
      mean = params.mean[channel];
      inv_std = params.inv_std[channel];
    }
    if (params.statistics != Statistics::given && params.mean) {
      params.mean[channel] = mean;
      params.inv_std[channel] = inv_std;
    }
    affine.set(channel, layout.channels,
               Affine<A>::make(mean, inv_std, params.weight.load_or(channel, 1), params.bias.load_or(channel, 0)));
    return true;
  };
  const int64_t bytes = layout.numel() * element_size(params.dtype);
  const bool past_caches = stores_past_caches({params.output}, bytes, (params.residual ? 3 : 2) * bytes, threads.count);
  auto apply = [&](const Block& block, const MaskBlock& mask_block, int64_t channel) {
    const NormalizeArgs args{params.input,      params.residual,        params.output, params.mask,
                             params.activation, affine.arrays(channel), past_caches};
    (partition.in_columns() ? table.column_normalize : table.channel_normalize)(args, block, mask_block);
  };
  if (!batch) {
    run_last_phase(partition, layout.channels, threads, [&](int64_t channel) { finish(channel, Look::first); }, apply);
    return;
  }
  run_phases(
      partition, layout.channels, threads, [&](int64_t channel) { statistician->prepare(channel); },
      [&](int64_t i, Look look) { statistician->reduce(i, look); }, finish, apply);
}

template <class A>
void channel_stats_as(const ForwardParams& params, const Threads& threads) {
  const Partition partition(params.layout);
  Statistician<A> statistician(params, partition);
  auto finish = [&](int64_t channel, Look look) {
    const std::optional<Moments> moments = statistician.moments(channel, look);
    if (!moments) return false;
    params.mean[channel] = moments->mean;
    params.var[channel] = moments->var();
    return true;
  };
  run_phases(
      partition, params.layout.channels, threads, [&](int64_t channel) { statistician.prepare(channel); },
      [&](int64_t i, Look look) { statistician.reduce(i, look); }, finish,
      [](const Block&, const MaskBlock&, int64_t) {});
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
