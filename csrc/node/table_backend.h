// The launchers of fastbn._C as a Backend of the ops.
#pragma once

#include "bindings/launchers.h"

namespace fastbn {

// The table of fastbn._C, or null before the module's initialisation has read it.
extern const LauncherTable* launcher_table;

class TableBackend {
 public:
  explicit TableBackend(Site& site)
      : site_(site), launchers_(site.device() < 0 ? launcher_table->cpu : launcher_table->cuda) {}
  void forward(const ForwardParams& params) { launchers_.forward(params, site_); }
  void backward(const BackwardParams& params) { launchers_.backward(params, site_); }

 private:
  Site& site_;
  const Launchers& launchers_;
};

}  // namespace fastbn
