// Cuts few rows of very many channels into panels of neighbouring channels, each of which one thread takes through all
// phases of an op. Rows alone would be too few to share out, and tables of an entry per channel, which take several
// times as much memory as so few rows, stay in a core's caches. Sums of a channel do not depend on the panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/launch.h"
#include "math/layout.h"
#include "math/params.h"

namespace fastbn::cpu {

// Estimates: a panel with its tables fits in 512 KiB of L2, and its stretches of rows are as long as prefetchers like
// them. Of more rows there are blocks enough to share out, and tables are small against them.
constexpr int64_t max_panel_rows = 64, max_panel_channels = 4096, panel_elements = 32768;

// Whole mask bytes and whole vectors, so that no two panels share either.
inline int64_t panel_channels(const Layout& layout) {
  return std::min(max_panel_channels, panel_elements / layout.outer / 64 * 64);
}

inline bool has_panels(const Layout& layout) {
  return layout.channels_are_innermost() && layout.outer <= max_panel_rows &&
         layout.channels >= 2 * panel_channels(layout);
}

template <class T>
T* advance(T* pointer, int64_t count) {
  return pointer ? pointer + count : nullptr;
}
inline const void* advance_bytes(const void* tensor, int64_t bytes) {
  return advance(static_cast<const char*>(tensor), bytes);
}
inline void* advance_bytes(void* tensor, int64_t bytes) { return advance(static_cast<char*>(tensor), bytes); }
inline ChannelVector advance(const ChannelVector& vector, int64_t channels) {
  return {advance_bytes(vector.data, channels * element_size(vector.dtype)), vector.dtype};
}

// Returns `params` with every pointer at channel `first` instead of 0; the layout remains that of the whole tensor.
inline ForwardParams from_channel(ForwardParams params, int64_t first) {
  const int64_t bytes = first * element_size(params.dtype);
  params.input = advance_bytes(params.input, bytes);
  params.residual = advance_bytes(params.residual, bytes);
  params.output = advance_bytes(params.output, bytes);
  params.mask = advance(params.mask, first / 8);
  for (ChannelVector* vector : {&params.weight, &params.bias, &params.running_mean, &params.running_var})
    *vector = advance(*vector, first);
  for (double** vector : {&params.mean, &params.inv_std, &params.var}) *vector = advance(*vector, first);
  return params;
}

inline BackwardParams from_channel(BackwardParams params, int64_t first) {
  const int64_t bytes = first * element_size(params.dtype);
  for (const void** tensor : {&params.grad_out, &params.input, &params.residual})
    *tensor = advance_bytes(*tensor, bytes);
  for (void** tensor : {&params.grad_input, &params.grad_residual}) *tensor = advance_bytes(*tensor, bytes);
  params.mask = advance(params.mask, first / 8);
  for (ChannelVector* vector : {&params.weight, &params.bias, &params.grad_weight, &params.grad_bias})
    *vector = advance(*vector, first);
  for (const double** vector : {&params.mean, &params.inv_std}) *vector = advance(*vector, first);
  for (double** vector : {&params.sum_grad, &params.sum_grad_xhat}) *vector = advance(*vector, first);
  return params;
}

// Calls call(params, channels, threads) for each panel, on that thread alone, or once for a tensor that has none.
template <class Params, class Call>
void for_each_panel(const Params& params, const Threads& threads, Call&& call) {
  const int64_t channels = params.layout.channels;
  if (!has_panels(params.layout)) return call(params, channels, threads);
  const Threads this_thread{
      1, [](int64_t count, int64_t, void (*task)(int64_t, int64_t, void*), void* context) { task(0, count, context); }};
  const int64_t width = panel_channels(params.layout);
  threads.for_each((channels + width - 1) / width, 1, [&](int64_t panel) {
    const int64_t first = panel * width;
    call(from_channel(params, first), std::min(width, channels - first), this_thread);
  });
}

}  // namespace fastbn::cpu
