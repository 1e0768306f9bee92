#include "bindings/library.h"

#include "bindings/max_sms.h"
#include "cpu/kernels/kernels.h"
#ifdef FASTBN_WITH_CUDA
#include "bindings/cuda_backend.h"
#endif

#ifdef __clang__
#define FASTBN_COMPILER "clang " __clang_version__
#else
#define FASTBN_COMPILER "g++ " __VERSION__
#endif

namespace fastbn {
namespace {

Library describe() {
  Library library{};
  library.compiler = FASTBN_COMPILER;
  library.built_with_torch = FASTBN_TORCH_VERSION;
  library.cuda_architectures = FASTBN_CUDA_ARCHITECTURES;
  library.cpu_instruction_sets = cpu::instruction_sets();
  library.cpu_instruction_set = cpu::instruction_set();
  library.max_sms = &max_sms;
  library.allocate_in_python = &allocate_in_python;
  library.launchers.cpu = cpu_launchers;
#ifdef FASTBN_WITH_CUDA
  library.finds_cuda_stream = finds_cuda_stream;
  library.limits_of_device = [](int32_t device) { return limits_of_device(device); };
  library.launchers.cuda = cuda_launchers;
#endif
  return library;
}

}  // namespace
}  // namespace fastbn

const fastbn::Library* fastbn_library() {
  static const fastbn::Library library = fastbn::describe();
  return &library;
}
