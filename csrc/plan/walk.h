// How blocks walk a tensor: by channels or by rows, and in how wide tiles.
#pragma once

#include <cstdint>

#include "math/layout.h"
#include "plan/plan.h"

namespace fastbn {

// Makes channel tiles `vectors_per_row` vectors wide.
inline void set_tile_width(const Layout& layout, int64_t vectors_per_row, Plan& plan) {
  plan.kernel = Kernel::row_tiles;
  plan.vectors_per_row = static_cast<int>(vectors_per_row);
  plan.row_width = static_cast<int>(plan.fold * layout.channels * layout.inner);
  const int64_t channels = vectors_per_row * vec_size / layout.inner;  // with packed rows, `fold` times all channels
  plan.channels_per_tile = static_cast<int>(plan.fold > 1 ? layout.channels : channels);
  plan.tiles = plan.fold > 1 ? 1 : static_cast<int>((layout.channels + channels - 1) / channels);
}

// Chooses how blocks walk the tensor. Tiles of aligned rows are as wide as they can be.
inline Plan choose_walk(const Request& request) {
  const Layout& layout = request.layout;
  const int64_t bytes = int64_t(element_size(request.dtype)), width = layout.channels * layout.inner;
  // Returns how many stretches of `elements` fill whole vectors.
  const auto repeats = [](int64_t elements) {
    int64_t count = 1;
    while (count * elements % vec_size != 0) ++count;
    return count;
  };
  Plan plan;
  plan.tiles = static_cast<int>(layout.channels);
  plan.vectorized = request.aligned && layout.run() % vec_size == 0;
  // Estimate: runs of a cache line and more need no neighbours.
  const bool walks_runs =
      layout.run() % vec_size == 0 && (layout.channels_are_innermost() || layout.inner * bytes >= 128);
  // A mask has whole bytes per run, so its bits do not line up with vectors that span runs.
  const bool may_span_runs = request.aligned && (!request.masked || layout.run() % vec_size == 0);
  if (!walks_runs && may_span_runs && layout.numel() > 0) {
    const int64_t channels = repeats(layout.inner);
    int64_t vectors_per_row = channels * layout.inner / vec_size;
    if (!layout.channels_are_innermost() && layout.channels % channels == 0 && vectors_per_row <= max_threads) {
      const int64_t min_vectors = vectors_per_row;
      while (vectors_per_row * vec_size * bytes < 128 && vectors_per_row * vec_size < width &&
             vectors_per_row + min_vectors <= max_threads) {
        vectors_per_row += min_vectors;
      }
      set_tile_width(layout, vectors_per_row, plan);
      plan.vectorized = true;
      return plan;
    }
    const int64_t fold = repeats(width);
    if (fold * width / vec_size <= max_threads) {
      plan.fold = static_cast<int>(fold);
      set_tile_width(layout, fold * width / vec_size, plan);
      plan.vectorized = true;
      return plan;
    }
  }
  if (layout.channels_are_innermost()) {
    int64_t vectors_per_row = 1;
    // Estimate: 32 vectors are 512 bytes of bf16 per row, whole sectors for any dtype.
    while (vectors_per_row < 32 && vectors_per_row * vec_size < width) vectors_per_row *= 2;
    set_tile_width(layout, vectors_per_row, plan);
  }
  return plan;
}

// Returns whether all walks of a plan are aligned: whether every vector is full and 16-byte aligned, so that kernels
// need no bounds checks.
inline bool is_aligned_walk(const Plan& plan, const Layout& layout) {
  constexpr int64_t max_vectors = 1 << 30;  // the sum of two indices is an int
  return plan.vectorized && layout.outer % plan.fold == 0 &&
         (plan.kernel == Kernel::row_tiles || plan.vectors_per_run(layout) < max_vectors);
}

// Returns how many vectors of each tensor a thread has where `blocks` blocks share a channel tile.
inline int64_t vectors_per_thread(const Layout& layout, const Plan& plan, int64_t blocks) {
  const int64_t items_per_block = (plan.work_items(layout) + blocks - 1) / blocks;
  const int64_t rows_of_threads = plan.threads / plan.vectors_per_row;
  return (items_per_block + rows_of_threads - 1) / rows_of_threads;
}

}  // namespace fastbn
