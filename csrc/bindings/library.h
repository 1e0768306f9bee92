// What libfastbn.so, which knows nothing of Python, tells fastbn._C, the module that is built for each version of
// Python and finds it by one C function. The two are of one build; a part of another is refused by its version and
// size.
#pragma once

#include <atomic>
#include <cstdint>

#include "bindings/allocate_in_python.h"
#include "bindings/launchers.h"
#include "plan/device.h"

namespace fastbn {

struct Library {
  int64_t bytes = sizeof(Library);
  const char* version = FASTBN_VERSION;
  const char* compiler;
  const char* built_with_torch;
  const char* cuda_architectures;           // as in TORCH_CUDA_ARCH_LIST; empty without CUDA
  const char* const* cpu_instruction_sets;  // cpu::instruction_sets()
  const char* cpu_instruction_set;
  bool (*finds_cuda_stream)();  // null without CUDA, as the next one
  DeviceLimits (*limits_of_device)(int32_t device);
  std::atomic<int>* max_sms;
  std::atomic<AllocateInPython>* allocate_in_python;
  LauncherTable launchers;
};

}  // namespace fastbn

extern "C" __attribute__((visibility("default"))) const fastbn::Library* fastbn_library();
