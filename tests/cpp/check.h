// Checks for the C++ tests. Failures are counted, the first hundred are printed, and main returns
// fastbn::test::result().
#pragma once

#include <cmath>
#include <cstdint>
#include <iostream>

namespace fastbn::test {

constexpr int skipped = 77;  // the exit status that CTest takes for a skipped test

inline int64_t failures = 0;
constexpr int64_t printed_failures = 100;  // tensors have thousands of elements

inline void report(bool passed, const char* file, int line, const char* text) {
  if (passed || ++failures > printed_failures) return;
  std::cerr << file << ":" << line << ": failed: " << text << "\n";
}

template <class A, class B>
void report_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b || ++failures > printed_failures) return;
  std::cerr << file << ":" << line << ": failed: " << text << ": " << a << " against " << b << "\n";
}

// Written so that a NaN fails.
inline void report_near(double a, double b, double tolerance, const char* file, int line, const char* text) {
  if (std::fabs(a - b) <= tolerance || ++failures > printed_failures) return;
  std::cerr << file << ":" << line << ": failed: " << text << ": " << a << " against " << b << ", tolerance "
            << tolerance << "\n";
}

inline int result() {
  if (failures != 0) std::cerr << failures << " checks failed\n";
  return failures == 0 ? 0 : 1;
}

}  // namespace fastbn::test

#define CHECK(...) fastbn::test::report(static_cast<bool>(__VA_ARGS__), __FILE__, __LINE__, #__VA_ARGS__)
#define CHECK_EQUAL(a, b) fastbn::test::report_equal(a, b, __FILE__, __LINE__, #a " == " #b)
#define CHECK_NEAR(a, b, tolerance) fastbn::test::report_near(a, b, tolerance, __FILE__, __LINE__, #a " ~ " #b)
