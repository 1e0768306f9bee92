// Cuts tensors of few rows and very many channels into panels of neighbouring channels. One thread takes a panel
// through all phases of an op. Rows alone would give too few tiles to split among threads, and this way the per-channel
// tables, several times as large as the rows, stay in a core's caches. In all types but float64, a channel's sums do
// not depend on the panels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/launch.h"
#include "math/layout.h"
#include "math/params.h"

namespace fastbn::cpu {

// Estimates: a panel with its tables fits in 512 KiB of L2, and its rows are long enough for hardware prefetchers.
// Tensors of more rows have enough tiles to split among threads, and their tables are small by comparison.
constexpr int64_t max_panel_rows = 64, max_panel_channels = 4096, panel_elements = 32768;

// Returns the channels per panel: a multiple of 64, so that no two panels share a byte of the mask or a vector.
inline int64_t panel_channels(const Layout& layout) {
  return std::min(max_panel_channels, panel_elements / layout.outer / 64 * 64);
}

inline bool has_panels(const Layout& layout) {
  return layout.channels_are_innermost() && layout.outer <= max_panel_rows &&
         layout.channels >= 2 * panel_channels(layout);
}

// Returns `pointer + count`, or null for a null pointer.
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

// Returns `params` with every pointer moved to channel `first`. The layout remains that of the full tensor.
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

// Calls `call(params, channels, threads)` for each panel, with `threads` being the current thread alone, or once for a
// tensor that has no panels.
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
