// Stackful contexts for one host thread: a short assembly switch on x86-64 and arm64 (swapcontext makes a system call
// per switch), ucontext elsewhere; AddressSanitizer is told of each switch.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FASTBN_EMULATOR_ASAN 1
#else
#define FASTBN_EMULATOR_ASAN 0
#endif

#if !defined(FASTBN_EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define FASTBN_EMULATOR_UCONTEXT
#endif

#if defined(FASTBN_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
// Saves the callee-saved registers on the running stack, stores its pointer to *save, and resumes from `load`.
extern "C" void fastbn_emulator_switch(void** save, void* load);
#endif

namespace fastbn::emulator {

struct Context {
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
#if defined(FASTBN_EMULATOR_UCONTEXT)
  ucontext_t registers;
#else
  void* registers = nullptr;
#endif
};

inline Context* previous_context = nullptr;

// Ends a switch. Call it first thing in a context, and after every switch back into it.
inline void after_switch([[maybe_unused]] Context& entered) {
#if FASTBN_EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(entered.fake_stack, &previous_context->stack, &previous_context->stack_bytes);
#endif
}

inline void switch_context(Context& from, Context& to) {
  previous_context = &from;
#if FASTBN_EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(FASTBN_EMULATOR_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  fastbn_emulator_switch(&from.registers, to.registers);
#endif
  after_switch(from);
}

// Makes a context that starts with `entry`, which must begin with after_switch and must not return. The first frame
// lies `offset` bytes (a multiple of 16) below the top of the stack.
inline void make_context(Context& context, unsigned char* stack, size_t bytes, size_t offset, void (*entry)()) {
  context.stack = stack;
  context.stack_bytes = bytes;
  context.fake_stack = nullptr;
#if defined(FASTBN_EMULATOR_UCONTEXT)
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes - offset;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#elif defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(stack + bytes - offset);
  *--top = nullptr;  // the return address of entry, which also gives it the alignment of a called function
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.registers = top;
#else
  auto** top = reinterpret_cast<void**>(stack + bytes - offset) - 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[11] = reinterpret_cast<void*>(entry);
  context.registers = top;
#endif
}

}  // namespace fastbn::emulator
