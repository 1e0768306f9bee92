// Gradients of training and of evaluation, input gradient with given sums, and the sums alone.
#include <vector>

#include "cpu/coefficients.h"
#include "cpu/kernels.h"
#include "cpu/launch.h"
#include "cpu/output.h"
#include "cpu/partition.h"

namespace fastbn::cpu {
namespace {

template <class A>
class Backward {
 public:
  Backward(const BackwardParams& params, const Threads& threads)
      : params_(params),
        threads_(threads),
        table_(kernels(params.dtype)),
        partition_(params.layout),
        affine_(partition_.entries()),
        grad_affine_(partition_.entries()) {}

  void run() {
    const int64_t bytes = params_.layout.numel() * element_size(params_.dtype);
    const int64_t tensors =
        2 + (params_.residual != nullptr) + (params_.grad_input != nullptr) + (params_.grad_residual != nullptr);
    past_caches_ =
        stores_past_caches({params_.grad_input, params_.grad_residual}, bytes, tensors * bytes, threads_.count);
    const bool frozen = params_.statistics == Statistics::running;
    const bool wants_sums = params_.grad_weight.defined() || params_.grad_bias.defined();
    const bool applies = params_.grad_input || params_.grad_residual;
    const bool reduces = wants_sums || (params_.statistics == Statistics::batch && params_.grad_input);
    if (reduces) partials_.resize(size_t(2 * partition_.partials()));

    auto finish = [&](int64_t channel, Look) {
      double sum_grad = 0, sum_grad_xhat = 0, count = double(params_.layout.count());
      if (reduces) {
        sums(channel, &sum_grad, &sum_grad_xhat);
        if (params_.grad_bias.defined()) params_.grad_bias.store(channel, sum_grad);
        if (params_.grad_weight.defined()) params_.grad_weight.store(channel, sum_grad_xhat);
      } else if (params_.statistics == Statistics::given) {
        sum_grad = params_.sum_grad[channel];
        sum_grad_xhat = params_.sum_grad_xhat[channel];
        count = *params_.count;
      }
      grad_affine_.set(channel, params_.layout.channels,
                       GradAffine<A>::make(params_.mean[channel], params_.inv_std[channel],
                                           params_.weight.load_or(channel, 1), sum_grad, sum_grad_xhat, count));
      return true;
    };
    auto apply = [&](const Block& block, const MaskBlock& mask_block, int64_t channel) {
      if (!applies) return;
      (partition_.in_columns() ? table_.column_input_grad : table_.channel_input_grad)(args_from(channel, frozen),
                                                                                       block, mask_block);
    };
    if (!reduces) {
      auto prepare_and_finish = [&](int64_t channel) {
        prepare(channel);
        finish(channel, Look::first);
      };
      run_last_phase(partition_, params_.layout.channels, threads_, prepare_and_finish, apply);
      return;
    }
    run_phases(
        partition_, params_.layout.channels, threads_, [&](int64_t channel) { prepare(channel); },
        [&](int64_t i, Look) { reduce_block(i); }, finish, apply);
  }

  void run_sums() {
    partials_.resize(size_t(2 * partition_.partials()));
    auto finish = [&](int64_t channel, Look) {
      sums(channel, &params_.sum_grad[channel], &params_.sum_grad_xhat[channel]);
      return true;
    };
    run_phases(
        partition_, params_.layout.channels, threads_, [&](int64_t channel) { prepare(channel); },
        [&](int64_t i, Look) { reduce_block(i); }, finish, [](const Block&, const MaskBlock&, int64_t) {});
  }

 private:
  void prepare(int64_t channel) {
    affine_.set(channel, params_.layout.channels,
                Affine<A>::make(params_.mean[channel], params_.inv_std[channel], params_.weight.load_or(channel, 1),
                                params_.bias.load_or(channel, 0)));
  }

  GradArgs args_from(int64_t first, bool frozen) const {
    return {params_.grad_out,
            params_.input,
            params_.residual,
            params_.mask,
            params_.activation,
            affine_.arrays(first),
            grad_affine_.arrays(first, frozen),
            params_.grad_input,
            params_.grad_residual,
            past_caches_};
  }

  void reduce_block(int64_t i) {
    const GradArgs args = args_from(partition_.first_channel(i), true);
    if (partition_.in_columns()) {
      table_.column_grad_sums(args, partition_.block(i), partition_.mask_block(i),
                              partition_.column_sums(i, partials_.data()));
    } else {
      const Sums sums = table_.channel_grad_sums(args, partition_.block(i), partition_.mask_block(i));
      partials_[size_t(2 * i)] = sums.first;
      partials_[size_t(2 * i + 1)] = sums.second;
    }
  }

  void sums(int64_t channel, double* sum_grad, double* sum_grad_xhat) const {
    const Sums total = partition_.sum_partials(channel, partials_.data());
    const double mean = params_.mean[channel];
    *sum_grad = total.first;
    *sum_grad_xhat = sum_grad_xhat_of(total.first, total.second, double(A(mean)), mean, params_.inv_std[channel]);
  }

  const BackwardParams& params_;
  const Threads& threads_;
  const Kernels& table_;
  Partition partition_;
  AffineTable<A> affine_;
  GradAffineTable<A> grad_affine_;
  std::vector<double> partials_;
  bool past_caches_ = false;
};

// What sums over no elements are.
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
    Backward<double>(params, threads).run();
  else
    Backward<float>(params, threads).run();
}

void grad_sums(const BackwardParams& params, const Threads& threads) {
  if (params.layout.count() == 0)
    for (int64_t c = 0; c < params.layout.channels; ++c) params.sum_grad[c] = params.sum_grad_xhat[c] = 0;
  else if (params.dtype == DType::float64)
    Backward<double>(params, threads).run_sums();
  else
    Backward<float>(params, threads).run_sums();
}

}  // namespace fastbn::cpu
