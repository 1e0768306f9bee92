// The launchers of a backend as the ops call them: inside of fastbn._C, and from csrc/node by a table of their
// addresses.
#pragma once

#include <cstdint>

#include "math/params.h"

namespace fastbn {

// What a launcher knows of the op that it runs for.
class Site {
 public:
  virtual const char* op() const = 0;
  // Returns the index of the operands' GPU, or -1.
  virtual int32_t device() const = 0;
  // Returns the address of a buffer on the operands' device, null for 0 bytes. It lives until the next call, or the end
  // of the op.
  virtual void* workspace(int64_t bytes) = 0;

 protected:
  ~Site() = default;
};

// The launchers that csrc/node calls.
struct Launchers {
  void (*forward)(const ForwardParams& params, Site& site);
  void (*backward)(const BackwardParams& params, Site& site);
};

// The launchers by type of device, null where this build has none, and the sizes of what they take. A csrc/node that
// was built with other sizes is refused; one of an older build with the same sizes is not noticed.
struct LauncherTable {
  int64_t forward_bytes = sizeof(ForwardParams), backward_bytes = sizeof(BackwardParams);
  Launchers cpu{}, cuda{};
};

template <class Backend>
constexpr Launchers launchers_of() {
  return {[](const ForwardParams& params, Site& site) { Backend(site).forward(params); },
          [](const BackwardParams& params, Site& site) { Backend(site).backward(params); }};
}

// Those of fastbn._C.
extern const Launchers cpu_launchers, cuda_launchers;

}  // namespace fastbn
