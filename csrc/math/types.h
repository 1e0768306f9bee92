// Element types and the type that arithmetic on them is done in. The half types are bare storage with conversions that
// round to nearest even, so that g++ and nvcc share them without CUDA's headers.
#pragma once

#include <cstdint>

#include "math/macros.h"

namespace fastbn {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

enum class DType : int { float32, float64, bfloat16, float16 };
constexpr const char* dtype_names[] = {"float32", "float64", "bfloat16", "float16"};  // in the order of DType

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::float32: return 4;
    case DType::float64: return 8;
    case DType::bfloat16:
    case DType::float16: return 2;
  }
  __builtin_unreachable();
}

// The type that elements of T are computed in: double for double, float for all others.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccumulateType<T>::type;

template <class To, class From>
FASTBN_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}

FASTBN_INLINE float to_acc(float value) { return value; }
FASTBN_INLINE double to_acc(double value) { return value; }
FASTBN_INLINE float to_acc(bfloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
FASTBN_INLINE float to_acc(float16 value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  // Multiplying by 2^112 rebases the exponent and normalises subnormals at once.
  float result = bit_cast<float>(magnitude) * bit_cast<float>(uint32_t(254 - 15) << 23);
  if ((value.bits & 0x7c00) == 0x7c00) result = bit_cast<float>(magnitude | 0x7f800000u);
  return bit_cast<float>(bit_cast<uint32_t>(result) | (uint32_t(value.bits & 0x8000) << 16));
#endif
}

// Convert the lower or the upper of two half-precision elements in a word.
template <class T>
FASTBN_INLINE float lower_to_acc(uint32_t word) {
  return to_acc(T{uint16_t(word)});
}
template <class T>
FASTBN_INLINE float upper_to_acc(uint32_t word) {
  return to_acc(T{uint16_t(word >> 16)});
}
template <>
FASTBN_INLINE float upper_to_acc<bfloat16>(uint32_t word) {
  return bit_cast<float>(word & 0xffff0000u);
}

template <class T, class A>
FASTBN_INLINE T from_acc(A value) {
  return T(value);
}
template <>
FASTBN_INLINE bfloat16 from_acc<bfloat16, float>(float value) {
#if __CUDA_ARCH__ >= 800
  bfloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(is_nan ? 0x7fc0u : rounded)};
#endif
}
template <>
FASTBN_INLINE float16 from_acc<float16, float>(float value) {
#ifdef __CUDA_ARCH__
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and above, inf, NaN
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the float adder aligns and rounds
    const float aligned = bit_cast<float>(magnitude) + 0.5f;
    half = bit_cast<uint32_t>(aligned) - 0x3f000000u;
  } else {  // rebias by -112, round to nearest even; a carry into the exponent is right, also into inf
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {uint16_t(sign | half)};
#endif
}

// A per-channel vector whose dtype is known only at run time: weight, bias and running statistics are read and written
// once per channel, so a switch costs nothing and kernels need no template parameter for it. Null if absent.
struct ChannelVector {
  void* data = nullptr;
  DType dtype = DType::float32;

  FASTBN_INLINE bool defined() const { return data != nullptr; }

  FASTBN_INLINE double load(int64_t channel) const {
    switch (dtype) {
      case DType::float32: return static_cast<const float*>(data)[channel];
      case DType::float64: return static_cast<const double*>(data)[channel];
      case DType::bfloat16: return to_acc(static_cast<const bfloat16*>(data)[channel]);
      case DType::float16: return to_acc(static_cast<const float16*>(data)[channel]);
    }
    __builtin_unreachable();
  }

  FASTBN_INLINE double load_or(int64_t channel, double fallback) const { return defined() ? load(channel) : fallback; }

  FASTBN_INLINE void store(int64_t channel, double value) const {
    switch (dtype) {
      case DType::float32: static_cast<float*>(data)[channel] = float(value); break;
      case DType::float64: static_cast<double*>(data)[channel] = value; break;
      case DType::bfloat16: static_cast<bfloat16*>(data)[channel] = from_acc<bfloat16>(float(value)); break;
      case DType::float16: static_cast<float16*>(data)[channel] = from_acc<float16>(float(value)); break;
    }
  }

  // Load and store channels [first, first + count), with one switch for all of them.
  void load_or(int64_t first, int64_t count, double fallback, double* values) const {
    auto convert = [=](const auto* source) {
      for (int64_t i = 0; i < count; ++i) values[i] = to_acc(source[first + i]);
    };
    if (!defined()) {
      for (int64_t i = 0; i < count; ++i) values[i] = fallback;
      return;
    }
    switch (dtype) {
      case DType::float32: return convert(static_cast<const float*>(data));
      case DType::float64: return convert(static_cast<const double*>(data));
      case DType::bfloat16: return convert(static_cast<const bfloat16*>(data));
      case DType::float16: return convert(static_cast<const float16*>(data));
    }
  }

  void store(int64_t first, int64_t count, const double* values) const {
    auto convert = [=]<class T>(T* target) {
      for (int64_t i = 0; i < count; ++i) target[first + i] = from_acc<T>(acc_t<T>(values[i]));
    };
    switch (dtype) {
      case DType::float32: return convert(static_cast<float*>(data));
      case DType::float64: return convert(static_cast<double*>(data));
      case DType::bfloat16: return convert(static_cast<bfloat16*>(data));
      case DType::float16: return convert(static_cast<float16*>(data));
    }
  }
};

}  // namespace fastbn
