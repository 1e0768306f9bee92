// The module fastbn._C, built for each version of Python. Importing it loads libfastbn.so, which lies beside it and
// registers the ops; its own functions are build information and the planner.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/library.h"
#include "math/activation.h"
#include "plan/device.h"
#include "plan/planner.h"
#include "python/allocate.h"

namespace py = pybind11;

namespace {

using namespace fastbn;

// Loads libfastbn.so from the folder of this module. The path is absolute, so that no search path is involved.
const Library& load_library() {
  Dl_info module;
  dladdr(reinterpret_cast<const void*>(&load_library), &module);
  const std::string folder(module.dli_fname, std::string(module.dli_fname).rfind('/') + 1);
  void* const handle = dlopen((folder + "libfastbn.so").c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw py::import_error(dlerror());
  const auto describe = reinterpret_cast<decltype(&fastbn_library)>(dlsym(handle, "fastbn_library"));
  const Library* const library = describe ? describe() : nullptr;
  if (!library || library->bytes != sizeof(Library) || std::string(library->version) != FASTBN_VERSION)
    throw py::import_error("libfastbn.so: expected that of fastbn " FASTBN_VERSION ", got another one; install again");
  return *library;
}

const Library& library() {
  static const Library& loaded = load_library();
  return loaded;
}

py::dict build_info() {
  std::vector<std::string> sets;
  for (const char* const* name = library().cpu_instruction_sets; *name; ++name) sets.emplace_back(*name);
  py::dict info;
  info["compiler"] = library().compiler;
  info["built_with_torch"] = library().built_with_torch;
  info["cuda_architectures"] = library().cuda_architectures;
  info["finds_cuda_stream"] = library().finds_cuda_stream && library().finds_cuda_stream();
  info["cpu_instruction_sets"] = sets;
  info["cpu_instruction_set"] = library().cpu_instruction_set;
  info["dtypes"] = std::vector<std::string>(std::begin(dtype_names), std::end(dtype_names));
  return info;
}

template <class... All>
py::list list_of(ActivationList<All...>) {
  py::list list;
  const auto append = [&](auto activation) {
    py::dict row;
    row["name"] = activation.name;
    row["is_piecewise_linear"] = activation.form == Form::piecewise_linear;
    row["default_param"] = py::none();
    if constexpr (activation.has_param) row["default_param"] = activation.default_param;
    list.append(row);
  };
  (append(All()), ...);
  return list;
}

DeviceLimits named_device(const std::string& name) {
  std::string names;
  for (const DeviceLimits& limits : known_devices) {
    if (name == limits.name) return limits;
    names += (names.empty() ? "" : ", ") + std::string(limits.name);
  }
  throw std::invalid_argument("device: expected one of " + names + ", got '" + name + "'");
}

DeviceLimits device_limits(int device) {
  if (library().limits_of_device) return library().limits_of_device(device);
  throw std::invalid_argument("device_limits: fastbn was built without CUDA, got device " + std::to_string(device));
}

Direction direction_named(const std::string& name) {
  if (name == "forward") return Direction::forward;
  if (name == "eval") return Direction::eval;
  if (name == "backward") return Direction::backward;
  if (name == "frozen_backward") return Direction::frozen_backward;
  throw std::invalid_argument("direction: expected one of forward, eval, backward, frozen_backward, got '" + name +
                              "'");
}

// Returns the addresses that csrc/node calls.
py::capsule launchers() { return py::capsule(&library().launchers, "fastbn launchers"); }

py::dict plan(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int dtype,
              const std::string& direction, int activation, bool residual, bool aligned, const DeviceLimits& limits) {
  const int64_t dim = int64_t(sizes.size());
  Request request;
  request.layout = layout_of(sizes.data(), dim, suggest_memory_format(sizes.data(), strides.data(), dim));
  request.dtype = DType(dtype);
  request.direction = direction_named(direction);
  request.activation = Activation(activation);
  request.residual = residual;
  // The rule is that of CudaBackend.saves_mask in fastbn/backends/native.py.
  request.masked = residual && is_piecewise_linear(request.activation) && request.layout.run() % 8 == 0;
  request.aligned = aligned;
  const Plan chosen = choose_plan(request, within_max_sms(limits, *library().max_sms));
  const StreamPlan& stream = chosen.stream;
  const bool streams = chosen.schedule == Schedule::stream;
  py::dict result;
  const std::string kernel = chosen.kernel == Kernel::channel_tiles ? "channel_tiles" : "row_tiles";
  result["kernel"] = streams ? "stream_" + kernel : kernel;
  result["predicted_us"] =
      streams ? predicted_stream_us(request, limits, chosen) : predicted_two_phase_us(request, limits, chosen);
  result["tiles"] = chosen.tiles;
  result["groups"] = chosen.groups;
  result["splits"] = chosen.splits;
  result["tensors"] = stream.tensors;
  result["ahead"] = stream.ahead;
  result["ring_tiles"] = stream.ring_tiles;
  result["chunks_per_tile"] = stream.chunks_per_tile;
  const int64_t part_bytes = stream.tensors * stream.vectors_per_split * int64_t(sizeof(Bytes16));
  result["part_bytes"] = part_bytes;
  // The same as the timing model (bench/model) counts it: chunks of equal size.
  result["chunks"] = stream.ring_tiles * stream.chunks_per_tile;
  result["chunk_bytes"] = part_bytes / std::max(stream.chunks_per_tile, 1);
  result["launches"] = chosen.launches;
  result["tensor_reads"] = chosen.tensor_reads;
  result["tensor_writes"] = chosen.tensor_writes;
  result["blocks"] = chosen.groups * (streams || chosen.launches > 1 ? chosen.splits : chosen.last_splits);
  result["threads"] = chosen.threads;
  result["channels_per_tile"] = chosen.channels_per_tile;
  result["shared_bytes"] = chosen.shared_bytes;
  result["vectorized"] = chosen.vectorized;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  *library().allocate_in_python = call_allocate;
  m.doc() = "Build information and the planner of fastbn; importing it registers torch.ops.fastbn.";
  py::class_<DeviceLimits>(m, "DeviceLimits", "The properties of a GPU that the planner uses.")
      .def(py::init([](int sm_count, int64_t shared_bytes_per_block, int64_t l2_bytes) {
             return DeviceLimits{"cuda", sm_count, shared_bytes_per_block, l2_bytes};
           }),
           py::kw_only(), py::arg("sm_count"), py::arg("shared_bytes_per_block"), py::arg("l2_bytes"))
      .def_readonly("sm_count", &DeviceLimits::sm_count)
      .def_readonly("shared_bytes_per_block", &DeviceLimits::shared_bytes_per_block)
      .def_readonly("l2_bytes", &DeviceLimits::l2_bytes);
  m.def("build_info", &build_info,
        "Return how this binary was built, and the CPU instruction sets that it can use here.");
  m.def(
      "activations", [] { return list_of(Activations()); },
      "Return the activations in the order of their numbers: name, whether they are piecewise linear, and torch's "
      "default of their parameter, or None.");
  m.def("named_device", &named_device, "Return the limits of a100, h100, h200 or b200.");
  m.def("device_limits", &device_limits, "Return the limits of a CUDA device of this machine, by its index.");
  m.def(
      "set_max_sms",
      [](std::optional<int> count) { *library().max_sms = count.value_or(std::numeric_limits<int>::max()); },
      "Let stream plans occupy at most `count` SMs; None allows all.", py::arg("count").none(true));
  m.def("launchers", &launchers, "Return the addresses of the launchers, for the fastbn._node_* of the same build.");
  m.def("plan", &plan,
        "Return the CUDA plan for a tensor's sizes and strides. Traffic is in units of one activation tensor.",
        py::kw_only(), py::arg("sizes"), py::arg("strides"), py::arg("dtype"), py::arg("direction"),
        py::arg("activation"), py::arg("residual"), py::arg("aligned"), py::arg("limits"));
}
