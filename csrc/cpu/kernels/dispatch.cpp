// Picks the instruction set once, from the CPU and from FASTBN_CPU.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels/kernels.h"

namespace fastbn::cpu {
namespace {

struct InstructionSet {
  const char* name;
  bool usable;
  const Kernels& (*kernels)(DType);
};

struct Choice {
  const InstructionSet* used;
  const char* names[5] = {};  // null-terminated
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

Choice choose() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512_bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512_bf16::kernels},
      {"avx512", has_avx512(), avx512::kernels},
      // Every processor with AVX2 has F16C, for which clang 14's __builtin_cpu_supports has no name.
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::kernels},
#endif
      {"portable", true, portable::kernels},
  };
  const char* wanted = std::getenv("FASTBN_CPU");
  Choice choice{};
  std::string usable;
  int count = 0;
  for (const InstructionSet& set : sets) {
    if (!set.usable) continue;
    choice.names[count++] = set.name;
    usable += usable.empty() ? set.name : std::string(", ") + set.name;
    if (!choice.used && (!wanted || !*wanted || std::string(wanted) == set.name)) choice.used = &set;
  }
  if (!choice.used)
    throw std::runtime_error("FASTBN_CPU: expected one of " + usable + " on this machine, got '" + wanted + "'");
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Kernels& kernels(DType dtype) { return choice().used->kernels(dtype); }
const char* const* instruction_sets() { return choice().names; }
const char* instruction_set() { return choice().used->name; }

}  // namespace fastbn::cpu
