// Training forward, evaluation forward, normalise with given statistics, and statistics alone.
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/partition.h"

namespace fastbn::cpu {
namespace {

Moments merge_partials(const Partition& partition, int64_t channel, const std::vector<Moments>& partials) {
  Moments total;
  partition.for_each_partial(channel, [&](int64_t i) { total = merge(total, partials[size_t(i)]); });
  return total;
}

void update_running_stats(const ForwardParams& params, int64_t channel, const Moments& moments, double factor) {
  if (params.running_mean.defined())
    params.running_mean.store(channel, running_average(params.running_mean.load(channel), moments.mean, factor));
  if (params.running_var.defined())
    params.running_var.store(channel, running_average(params.running_var.load(channel), moments.unbiased_var(), factor));
}

auto make_reduce(const ForwardParams& params, const Partition& partition, std::vector<Moments>& partials) {
  return [&params, &partition, &partials, &table = kernels(params.dtype)](int64_t i) {
    if (partition.in_columns())
      table.column_moments(params.input, partition.block(i), &partials[size_t(i * partition.width())]);
    else
      partials[size_t(i)] = table.channel_moments(params.input, partition.block(i));
  };
}

template <class A>
void forward_as(const ForwardParams& params, const Threads& threads) {
  const Layout& layout = params.layout;
  const Kernels& table = kernels(params.dtype);
  const Partition partition(layout, params.mask != nullptr);
  const bool batch = params.statistics == Statistics::batch;
  AffineTable<A> affine(partition.in_columns() ? partition.width() : layout.channels);
  std::vector<Moments> partials(batch ? size_t(partition.blocks() * partition.width()) : 0);

  double factor = 0;
  if (batch) {
    if (params.num_batches_tracked) ++*params.num_batches_tracked;
    factor = averaging_factor(params.has_momentum, params.momentum,
                              params.num_batches_tracked ? *params.num_batches_tracked : 0);
  }

  auto finish = [&](int64_t channel) {
    double mean, inv_std;
    if (batch) {
      const Moments moments = merge_partials(partition, channel, partials);
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
  if (batch)
    run_phases(partition, layout.channels, threads, make_reduce(params, partition, partials), finish, apply);
  else
    run_phases(partition, layout.channels, threads, [](int64_t) {}, finish, apply);
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
  const int64_t channels = params.layout.channels;
  if (params.layout.count() == 0) {
    for (int64_t c = 0; c < channels; ++c) params.mean[c] = params.var[c] = 0;
    return;
  }
  const Partition partition(params.layout, false);
  std::vector<Moments> partials(size_t(partition.blocks() * partition.width()));
  auto finish = [&](int64_t channel) {
    const Moments moments = merge_partials(partition, channel, partials);
    params.mean[channel] = moments.mean;
    params.var[channel] = moments.var();
  };
  run_phases(partition, channels, threads, make_reduce(params, partition, partials), finish, [](int64_t) {});
}

}  // namespace fastbn::cpu
