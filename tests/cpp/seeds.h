// What the tests of the emulator share: seeds, exact numbers, and the text of the latest failure.
#pragma once

#include <cstdint>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "emulator.h"

namespace fastbn::test {

constexpr int kSeeds = 8;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Returns small integers, whose sum is exact in every order.
inline std::vector<float> numbers(int64_t size) {
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>((i * 37) % 101 - 40);
  return values;
}

inline float sum(const std::vector<float>& values, int64_t first, int64_t count) {
  return std::accumulate(values.begin() + first, values.begin() + first + count, 0.0f);
}

template <class Body>
void for_each_seed(Body body) {
  for (int seed = 0; seed < kSeeds; ++seed) {
    emulator::set_seed(seed);
    body();
  }
}

inline bool mentions(const std::string& text) {
  return std::string(emulator::last_failure()).find(text) != std::string::npos;
}

}  // namespace fastbn::test
