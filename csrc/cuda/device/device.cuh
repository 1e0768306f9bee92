// The device primitives, and the only header through which a kernel touches CUDA; tests/emulator has the same ones for
// a CPU. All 32 lanes of a warp must reach a warp operation. Before sm_80 an asynchronous copy is an ordinary one and
// an mbarrier traps.
#pragma once

#include <cooperative_groups.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device/runtime.h"
#include "cuda/device/types.h"
#include "math/macros.h"
#include "math/types.h"

#define FASTBN_GLOBAL __global__
#define FASTBN_DEVICE __device__ __forceinline__
#define FASTBN_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)

namespace fastbn::device {

FASTBN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTBN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTBN_DEVICE int64_t block_x() { return blockIdx.x; }
FASTBN_DEVICE int64_t grid_x() { return gridDim.x; }

// Hides the value from the optimizer, so that expressions of it are recomputed in a loop instead of hoisted into
// registers that the loop needs.
template <class T>
FASTBN_DEVICE T opaque(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
  return value;
}

// Does the same for a pointer to global memory, which the compiler still knows to be one.
template <class T>
FASTBN_DEVICE T* opaque_global(T* pointer) {
  return static_cast<T*>(
      const_cast<void*>(static_cast<const void*>(__cvta_global_to_generic(opaque(__cvta_generic_to_global(pointer))))));
}

// Returns the larger of `a` and `b`, or NaN if `a` is NaN; `b` must be a number. The larger of two zeros is +0.
FASTBN_DEVICE float max_or_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a < b ? b : a;
#endif
}
FASTBN_DEVICE double max_or_nan(double a, double b) { return a < b ? b : a; }

// Rounds two numbers to a half type and packs them into a word, `lower` into its lower half. `relu`: negative numbers
// become 0, at no cost where the instruction does it.
template <class T, bool relu>
FASTBN_DEVICE uint32_t pack_pair(float lower, float upper) {
  static_assert(sizeof(T) == 2);
#if __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (std::is_same_v<T, bfloat16>) {
    if constexpr (relu) {
      asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
    }
  } else if constexpr (relu) {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(upper), "f"(lower));
  }
  return word;
#else
  if (relu) lower = max_or_nan(lower, 0.0f), upper = max_or_nan(upper, 0.0f);
  return from_acc<T>(lower).bits | uint32_t(from_acc<T>(upper).bits) << 16;
#endif
}

// Returns the block's dynamic shared memory, aligned to 16 bytes. It is the same memory for every T.
template <class T>
FASTBN_DEVICE T* shared_memory() {
  extern __shared__ __align__(16) unsigned char fastbn_shared_memory[];
  return reinterpret_cast<T*>(fastbn_shared_memory);
}

FASTBN_DEVICE void sync_warp() { __syncwarp(); }
FASTBN_DEVICE void sync_block() { __syncthreads(); }
FASTBN_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

namespace detail {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Shuffles a value of any type as 32-bit words.
template <class T, class Shuffle>
FASTBN_DEVICE T shuffle_words(const T& value, Shuffle shuffle) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0 && sizeof(T) <= 32);
  constexpr int kWords = sizeof(T) / 4;
  uint32_t words[kWords];
  memcpy(words, &value, sizeof(T));
  FASTBN_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = shuffle(words[i]);
  T result;
  memcpy(&result, words, sizeof(T));
  return result;
}

}  // namespace detail

template <class T>
FASTBN_DEVICE T shuffle_xor(T value, int lane_mask) {
  return detail::shuffle_words(value,
                               [=](uint32_t word) { return __shfl_xor_sync(detail::kAllLanes, word, lane_mask); });
}

FASTBN_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(detail::kAllLanes, predicate); }

namespace detail {

// An int4 moves in one instruction; the compiler may split a struct of eight halves.
template <class T>
FASTBN_DEVICE Vector16<T> from_words(int4 words) {
  Vector16<T> value;
  memcpy(&value, &words, 16);
  return value;
}

template <class T>
FASTBN_DEVICE int4 to_words(const Vector16<T>& value) {
  int4 words;
  memcpy(&words, &value, 16);
  return words;
}

}  // namespace detail

template <class T>
FASTBN_DEVICE Vector16<T> load16(const T* from) {
  return detail::from_words<T>(*reinterpret_cast<const int4*>(from));
}

template <class T>
FASTBN_DEVICE void store16(T* to, const Vector16<T>& value) {
  *reinterpret_cast<int4*>(to) = detail::to_words(value);
}

// Stores a message for another block, which sees it some time later. PTX takes the two halves for two accesses in no
// order, so that a reader may see one half without the other; each half is whole. What a thread wrote before it is not
// visible with it: a message carries all of its data, and no fence is needed.
FASTBN_DEVICE void store_message(Message16* to, const Message16& message) {
  uint64_t half[2];
  memcpy(half, &message, 16);
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "l"(half[0]),
               "l"(half[1])
               : "memory");
}

FASTBN_DEVICE Message16 load_message(const Message16* from) {
  uint64_t half[2];
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(half[0]), "=l"(half[1])
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  Message16 message;
  memcpy(&message, half, 16);
  return message;
}

// Stands in every loop that polls for a message: the emulator runs another thread there.
FASTBN_DEVICE void pause() {}

#if __CUDA_ARCH__ >= 800

// Copies 16 bytes without going through registers and L1. They are visible to those who have waited for an
// arrive_after_copies that follows.
FASTBN_DEVICE void copy_async16(void* shared, const void* global) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
}

namespace detail {

FASTBN_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

}  // namespace detail

// Begins phase 0 of a barrier whose phases take `arrivals` arrivals each. A sync_block must come between this and the
// other threads' use of the barrier.
FASTBN_DEVICE void init_mbarrier(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(detail::shared_address(barrier)), "r"(arrivals) : "memory");
}

// Arrives. Release: those who have waited for the phase see what this thread wrote before.
FASTBN_DEVICE void arrive(Mbarrier* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
}

// Arrives once all copies that this thread began before have landed; does not wait for them.
FASTBN_DEVICE void arrive_after_copies(Mbarrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(detail::shared_address(barrier)) : "memory");
}

// Waits until all copies that this thread began have landed.
FASTBN_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Waits until the current phase is not the one of `parity`, that is, until the latest phase of that parity has
// completed. On a fresh barrier, parity 1 returns at once. Acquire.
FASTBN_DEVICE void wait(Mbarrier* barrier, int parity) {
  uint32_t completed;
  do {
    asm volatile(
        "{\n"
        ".reg .pred completed;\n"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared.b64 completed, [%1], %2;\n"  // suspends the thread for a while
#else
        "mbarrier.test_wait.parity.shared.b64 completed, [%1], %2;\n"
#endif
        "selp.u32 %0, 1, 0, completed;\n"
        "}"
        : "=r"(completed)
        : "r"(detail::shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!completed);
}

#else

FASTBN_DEVICE void copy_async16(void* shared, const void* global) {
  *static_cast<int4*>(shared) = *static_cast<const int4*>(global);
}

FASTBN_DEVICE void init_mbarrier(Mbarrier*, int) { __trap(); }
FASTBN_DEVICE void arrive(Mbarrier*) { __trap(); }
FASTBN_DEVICE void arrive_after_copies(Mbarrier*) { __trap(); }
FASTBN_DEVICE void wait_for_copies() {}
FASTBN_DEVICE void wait(Mbarrier*, int) { __trap(); }

#endif

// Lets the next launch on the stream start, if it overlaps_previous, once all blocks have called this or returned.
FASTBN_DEVICE void allow_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits, in a launch that overlaps_previous, until the one before it has ended and all that it wrote is visible.
FASTBN_DEVICE void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

namespace detail {

// Allows a kernel the maximum of shared memory per block. With less, threads that launch the same kernel with different
// amounts would race.
inline cudaError_t allow_shared_memory(const void* kernel) {
  int device = 0, max_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&max_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_bytes);
  return error;
}

}  // namespace detail

// Returns the architecture for which the code was compiled that the current device runs of a kernel, as in sm_90; 0 on
// an error, which is cleared.
inline int code_version(const void* kernel) {
  cudaFuncAttributes code = {};
  if (cudaFuncGetAttributes(&code, kernel) == cudaSuccess) return code.ptxVersion;
  cudaGetLastError();
  return 0;
}

namespace detail {

// Returns whether the current device lets launches overlap and runs code in which wait_for_previous_launch waits: both
// came with sm_90. All kernels are compiled for the same architectures, so that a device has one answer.
inline bool can_overlap(const void* kernel) {
  enum Answer : int8_t { unknown, no, yes };
  constexpr int kDevices = 64;
  static std::array<std::atomic<int8_t>, kDevices> answers{};
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && device < kDevices && answers[device] != unknown) return answers[device] == yes;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) {
    cudaGetLastError();  // clear the error, so that the next launch does not report it
    return false;
  }
  const bool can = major >= 9 && code_version(kernel) >= 90;
  if (device < kDevices) answers[device] = can ? yes : no;
  return can;
}

}  // namespace detail

// Launches a kernel. Returns the error of the launch, and clears it; errors of the running kernel surface later, as
// usual.
template <class... P>
cudaError_t launch(void (*kernel)(P...), Launch shape, cudaStream_t stream, std::type_identity_t<P>... params) {
  constexpr int64_t kDefaultSharedBytes = 48 * 1024;  // what a kernel may take without opting in
  if (!is_valid(shape)) return cudaErrorInvalidConfiguration;

  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shape.shared_bytes > kDefaultSharedBytes) error = detail::allow_shared_memory(function);

  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (shape.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count].val.cooperative = 1;
    ++count;
  }
  if (shape.overlaps_previous && detail::can_overlap(function)) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid_x));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))..., nullptr};
  if (error == cudaSuccess) error = cudaLaunchKernelExC(&config, function, arguments);
  if (error != cudaSuccess) cudaGetLastError();  // clear the error, so that the next launch does not report it
  return error;
}

}  // namespace fastbn::device
