// How many blocks of a pass an SM holds, and the splits that fill whole waves of them: a last wave of a few blocks
// would leave most SMs idle.
#pragma once

#include <algorithm>
#include <cstdint>

#include "math/macros.h"
#include "plan/cost.h"
#include "plan/device.h"
#include "plan/plan.h"

namespace fastbn {

// The passes over the elements of two-phase plans.
enum class Pass { moments, normalize, grad_sums, input_grad };

// Returns the blocks of a pass that an SM's registers hold: the launch bounds of its kernels, which spill where they
// ask for more. tests/csrc/test_compiled_kernels.py compares it with what nvcc makes of them.
FASTBN_INLINE constexpr int compiled_blocks_per_sm(Pass pass, Kernel kernel, int64_t element_size, bool aligned) {
  const bool rows = kernel == Kernel::row_tiles, wide = element_size == 8;
  switch (pass) {
    case Pass::moments:
    case Pass::normalize: return rows || wide ? 2 : 3;
    case Pass::grad_sums: return wide || (rows && element_size == 4 && !aligned) ? 1 : 2;
    case Pass::input_grad:
      if (rows) return wide || (element_size == 4 && !aligned) ? 1 : 2;
      return wide ? 2 : 3;
  }
  __builtin_unreachable();
}

// Returns the blocks that a device runs at once, where each takes `shared_bytes`.
inline int64_t blocks_per_wave(const DeviceLimits& limits, int compiled_blocks, int64_t shared_bytes) {
  const int64_t room = (limits.shared_bytes_per_block + reserved_shared_bytes) / (shared_bytes + reserved_shared_bytes);
  return limits.sm_count * std::clamp<int64_t>(room, 1, compiled_blocks);
}

// Returns the number of splits, at most `max_splits`, with which a pass over `tiles` channel tiles is predicted to take
// the least time. `pass_us` is the time that a copy takes for its bytes.
inline int splits_in_whole_waves(int64_t tiles, int64_t blocks_per_wave, int64_t max_splits, double pass_us,
                                 double wave_us) {
  int64_t best = 1;
  double best_us = 0;
  for (int64_t splits = 1; splits <= max_splits; ++splits) {
    const int64_t blocks = tiles * splits, waves = (blocks + blocks_per_wave - 1) / blocks_per_wave;
    const double us = double(waves) * (wave_us + pass_us * double(blocks_per_wave) / double(blocks));
    if (splits > 1 && double(waves) * wave_us + pass_us > best_us) break;
    if (splits == 1 || us < best_us) best = splits, best_us = us;
  }
  return static_cast<int>(best);
}

}  // namespace fastbn
