// The launches of a plan and what they move, in units of one activation tensor.
#pragma once

#include "math/activation.h"
#include "math/types.h"
#include "plan/plan.h"

namespace fastbn {

inline void add_traffic(const Request& request, Plan& plan) {
  const bool activated = request.activation != Activation::none;
  const bool masked = request.masked;
  const double mask = masked ? 1.0 / (8 * double(element_size(request.dtype))) : 0;
  const double residual = request.residual ? 1 : 0;
  const bool once = plan.schedule == Schedule::stream;
  // A backward pass over the elements reads input, grad_out, and the mask or residual if the derivative depends on it.
  const double backward_pass = 2 + (!activated ? 0 : masked ? mask : residual);
  switch (request.direction) {
    case Direction::forward:
      plan.launches = once ? 1 : 3;
      plan.tensor_reads = (once ? 1 : 2) + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::eval:
      plan.tensor_reads = 1 + residual;
      plan.tensor_writes = 1 + mask;
      break;
    case Direction::backward:
      plan.launches = once ? 1 : 3;
      // A mask of a derivative that is not 0 or 1 is read twice even so: it does not pass through the ring.
      plan.tensor_reads = once ? backward_pass + (leaks(request.activation) ? mask : 0) : 2 * backward_pass;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
    case Direction::frozen_backward:  // weight and bias are frozen too; their gradients take x and a second launch
      plan.tensor_reads = !activated ? 1 : masked ? 1 + mask : 2 + residual;
      plan.tensor_writes = 1 + (activated ? residual : 0);
      break;
  }
}

}  // namespace fastbn
