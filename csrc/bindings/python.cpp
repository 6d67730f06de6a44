// The pybind11 module _C: every op over DLPack, and facts about the build. Knows no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../build_info.h"
#include "array_face.h"

namespace py = pybind11;
using twotower::Array;

namespace {

py::dict build_info() {
  const twotower::BuildInfo info = twotower::build_info();
  py::dict facts;
  facts["version"] = info.version;
  facts["compiler"] = info.compiler;
  facts["cuda"] = info.cuda;
  facts["cuda_version"] = info.cuda ? py::object(py::str(info.cuda_version)) : py::object(py::none());
  const bool cutlass = !info.cutlass_version.empty();
  facts["cutlass_version"] = cutlass ? py::object(py::str(info.cutlass_version)) : py::object(py::none());
  facts["architectures"] = info.architectures;
  facts["cpu_features"] = info.cpu_features;
  facts["cpu_isas"] = info.cpu_isas;
  facts["cpu_isa"] = info.cpu_isa;
  facts["threads"] = info.threads;
  py::dict kernels;
  for (const twotower::KernelResources& k : twotower::cuda_kernels()) {
    py::dict uses;
    uses["registers"] = k.registers;
    uses["shared_bytes"] = k.shared_bytes;
    uses["local_bytes"] = k.local_bytes;
    kernels[py::str(k.name)] = uses;
  }
  facts["kernels"] = kernels;
  return facts;
}

// Calls the op, which then computes nothing and says what it wants.
int64_t workspace_bytes(const py::module_& module, const std::string& op, const py::args& args,
                        const py::kwargs& kwargs) {
  if (op.rfind('_', 0) == 0 || op == "build_info" || op == "workspace_bytes" || op == "Array" ||
      !py::hasattr(module, op.c_str()))
    throw py::value_error("workspace_bytes: op must be the name of an op, got '" + op + "'");
  int64_t bytes = 0;
  struct Asking {
    explicit Asking(int64_t* where) { twotower::ArrayFace::asked_workspace = where; }
    ~Asking() { twotower::ArrayFace::asked_workspace = nullptr; }
  } const asking(&bytes);
  module.attr(op.c_str())(*args, **kwargs);
  return bytes;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of twotower_ext, without torch: every op over DLPack, and facts about the build.";
  m.def("build_info", build_info,
        "Facts about this build: version, compiler, cuda (bool), cuda_version (str or None), architectures (machine "
        "code and PTX in the library), cpu_features (of this processor), cpu_isas (instruction sets of the CPU "
        "kernels that run here, best last), cpu_isa (the one in use), threads (the CPU kernels' default), kernels (of "
        "every CUDA kernel by name, on the current device: registers a thread, shared_bytes a block, static ones, "
        "local_bytes a thread, where registers spill; empty without a device, which this initialises).");
  py::class_<Array>(m, "Array", py::module_local(),
                    "A result: contiguous memory that any library takes by DLPack, without a copy, for instance "
                    "numpy.from_dlpack(array). On CUDA it waits for nothing: the stream of whoever takes it does, and "
                    "the memory goes back in the order of that stream.")
      .def_property_readonly("shape", [](const Array& a) { return py::tuple(py::cast(a.shape())); })
      .def_property_readonly(
          "dtype", [](const Array& a) { return a.dtype_name(); }, "Its name, as 'bfloat16'.")
      .def_property_readonly("bits", &Array::bits,
                             "The same memory as uint16, of bfloat16 alone: NumPy has no bfloat16 (ml_dtypes has: "
                             "numpy.from_dlpack(a.bits).view(ml_dtypes.bfloat16)). ValueError for another dtype.")
      .def("__dlpack__", &Array::export_capsule, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", &Array::dlpack_device)
      .def("__repr__", [](const Array& a) {
        return "Array(shape=" + py::cast<std::string>(py::repr(py::tuple(py::cast(a.shape())))) + ", dtype='" +
               a.dtype_name() + "')";
      });
  twotower::define_array_ops(m);
  m.def(
      "workspace_bytes",
      [m](const std::string& op, const py::args& args, const py::kwargs& kwargs) {
        return workspace_bytes(m, op, args, kwargs);
      },
      "workspace_bytes(op, *args, **kwargs): the bytes of workspace that the call op(*args, **kwargs) wants; 0 on the "
      "CPU. Nothing is computed.");
}
