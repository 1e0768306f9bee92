// The module fastbn._node_<version of torch>: fastbn.functional.batch_norm in C++ for usual calls, which takes some 20
// us less per forward and backward than Python. fastbn works without it.
//
// This folder uses torch's C++ interface beyond the stable ABI, so its binary serves exactly the torch that it was
// compiled with, which is in its name.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "node/function.h"
#include "node/table_backend.h"
#include "node/usual.h"

namespace fastbn {
namespace {

// What a call is parsed from: the arguments of fastbn.functional.batch_norm in its order, `activation` as a number.
enum Argument {
  INPUT,
  RUNNING_MEAN,
  RUNNING_VAR,
  WEIGHT,
  BIAS,
  TRAINING,
  MOMENTUM,
  EPS,
  RESIDUAL,
  ACTIVATION,
  PARAM,
  NUM_BATCHES_TRACKED,
  ARGUMENTS
};

// The parsers return false for a type that only Python knows what to do with.

bool parse(PyObject* object, OptionalTensor& tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool parse(PyObject* object, double& number) {
  if (!PyFloat_CheckExact(object)) return false;
  number = PyFloat_AS_DOUBLE(object);
  return true;
}

bool parse(PyObject* object, std::optional<double>& number) {
  return object == Py_None || parse(object, number.emplace());
}

bool parse(PyObject* const* arguments, Call& call) {
  if (!THPVariable_CheckExact(arguments[INPUT]) || !PyBool_Check(arguments[TRAINING])) return false;
  call.input = THPVariable_Unpack(arguments[INPUT]);
  call.training = arguments[TRAINING] == Py_True;
  call.activation = PyLong_AsLongLong(arguments[ACTIVATION]);
  return parse(arguments[RUNNING_MEAN], call.running_mean) && parse(arguments[RUNNING_VAR], call.running_var) &&
         parse(arguments[WEIGHT], call.weight) && parse(arguments[BIAS], call.bias) &&
         parse(arguments[MOMENTUM], call.momentum) && parse(arguments[EPS], call.eps) &&
         parse(arguments[RESIDUAL], call.residual) && parse(arguments[PARAM], call.param) &&
         (!call.training || parse(arguments[NUM_BATCHES_TRACKED], call.num_batches_tracked));
}

// Returns whether fastbn was built for the GPU of a tensor, which is asked once per device.
bool serves(const Tensor& input) {
  if (!input.is_cuda()) return true;
  enum : int8_t { UNKNOWN, YES, NO };
  static std::array<int8_t, 64> known = {};  // the GIL guards it
  int8_t& answer = known.at(size_t(input.get_device()));
  if (answer == UNKNOWN) {
    const auto ask = pybind11::module_::import("fastbn.backends.node").attr("serves_gpu");
    answer = ask(input.get_device()).cast<bool>() ? YES : NO;
  }
  return answer == YES;
}

Tensor run(const Call& call) {
  if (is_recorded(call)) return BatchNormFunction::apply(call.input, call.residual, call.weight, call.bias, call);
  try {
    return call.training ? std::get<0>(train(call, false)) : eval(call);
  } catch (const std::exception&) {
    throw Refused();
  }
}

PyObject* batch_norm(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == ARGUMENTS, "batch_norm: expected ", int(ARGUMENTS), " arguments, got ", count);
  Call call;
  if (!parse(arguments, call) || !is_usual(call) || !serves(call.input)) Py_RETURN_NONE;
  Tensor output;
  try {
    const pybind11::gil_scoped_release no_gil;
    output = run(call);
  } catch (const Refused&) {
    Py_RETURN_NONE;
  }
  return THPVariable_Wrap(std::move(output));
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(batch_norm)), METH_FASTCALL,
     "Return what fastbn.functional.batch_norm returns for these arguments, in its order and with the activation's\n"
     "number. None: nothing was done, since the call is not usual or an op has refused it."},
    {nullptr, nullptr, 0, nullptr}};

// Reads the addresses of the launchers in fastbn._C, or raises ImportError where that is of another build.
void read_launchers() {
  const pybind11::capsule capsule = pybind11::module_::import("fastbn._C").attr("launchers")();
  const auto* const table = capsule.get_pointer<const LauncherTable>();
  if (table->forward_bytes != sizeof(ForwardParams) || table->backward_bytes != sizeof(BackwardParams))
    throw pybind11::import_error("expected fastbn._C of the same build, got another: build fastbn again");
  launcher_table = table;
}

}  // namespace
}  // namespace fastbn

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "fastbn.functional.batch_norm for usual calls, for one version of torch.";
  fastbn::read_launchers();
  if (PyModule_AddFunctions(module.ptr(), fastbn::functions) != 0) throw pybind11::error_already_set();
}
