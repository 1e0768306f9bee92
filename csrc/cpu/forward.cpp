// Training forward, evaluation forward, normalise with given statistics, and statistics alone.
#include <optional>
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/partition.h"
#include "math/moments.h"

namespace fastbn::cpu {
namespace {

// The reduction of a forward op: partial sums about an element of each channel, then their moments.
template <class A>
class Statistician {
 public:
  Statistician(const ForwardParams& params, const Partition& partition)
      : params_(params),
        partition_(partition),
        table_(kernels(params.dtype)),
        pivots_(size_t(std::max(params.layout.channels, partition.width()))),
        partials_(size_t(partition.partials())) {
    const int64_t channels = params.layout.channels;
    table_.pivots(params.input, params.layout, pivots_.data());
    for (size_t j = size_t(channels); j < pivots_.size(); ++j) pivots_[j] = pivots_[j - size_t(channels)];
  }

  void reduce(int64_t i) {
    if (partition_.in_columns())
      table_.column_sums(params_.input, partition_.block(i), pivots_.data(),
                         &partials_[size_t(i * partition_.width())]);
    else
      partials_[size_t(i)] =
          table_.channel_sums(params_.input, partition_.block(i), &pivots_[size_t(partition_.channel_of(i))]);
  }

  Moments moments(int64_t channel) const {
    const Sums total = partition_.sum_partials(channel, partials_);
    return Moments::from_shifted(double(params_.layout.count()), double(pivots_[size_t(channel)]), total.first,
                                 total.second);
  }

 private:
  const ForwardParams& params_;
  const Partition& partition_;
  const Kernels& table_;
  std::vector<A> pivots_;
  std::vector<Sums> partials_;
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
  const Partition partition(layout, params.mask != nullptr);
  const bool batch = params.statistics == Statistics::batch;
  AffineTable<A> affine(partition.in_columns() ? partition.width() : layout.channels);
  // Not that of the mask, so that statistics are the same bits with and without one.
  const Partition reduction(layout, false);
  std::optional<Statistician<A>> statistician;
  if (batch) statistician.emplace(params, reduction);

  double factor = 0;
  if (batch) {
    if (params.num_batches_tracked) ++*params.num_batches_tracked;
    factor = averaging_factor(params.has_momentum, params.momentum,
                              params.num_batches_tracked ? *params.num_batches_tracked : 0);
  }

  auto finish = [&](int64_t channel) {
    double mean, inv_std;
    if (batch) {
      const Moments moments = statistician->moments(channel);
      mean = moments.mean;
      inv_std = inv_std_of(moments.var(), params.eps);
      update_running_stats(params, channel, moments, factor);
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
  };
  auto apply = [&](int64_t i) {
    const NormalizeArgs args{params.input,      params.residual,
                             params.output,     params.mask,
                             params.activation, affine.arrays(partition.in_columns() ? 0 : partition.channel_of(i))};
    (partition.in_columns() ? table.column_normalize : table.channel_normalize)(args, partition.block(i),
                                                                                partition.mask_block(i));
  };
  auto reduce = [&](int64_t i) {
    if (batch) statistician->reduce(i);
  };
  run_phases(reduction, partition, layout.channels, threads, reduce, finish, apply);
}

template <class A>
void channel_stats_as(const ForwardParams& params, const Threads& threads) {
  const Partition partition(params.layout, false);
  Statistician<A> statistician(params, partition);
  auto finish = [&](int64_t channel) {
    const Moments moments = statistician.moments(channel);
    params.mean[channel] = moments.mean;
    params.var[channel] = moments.var();
  };
  auto reduce = [&](int64_t i) { statistician.reduce(i); };
  run_phases(partition, partition, params.layout.channels, threads, reduce, finish, [](int64_t) {});
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
