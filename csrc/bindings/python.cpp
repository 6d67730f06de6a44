// The pybind11 module _C: build facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../build_info.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of twotower_ext, without torch.";
  m.def(
      "build_info",
      [] {
        const twotower::BuildInfo info = twotower::build_info();
        py::dict facts;
        facts["version"] = info.version;
        facts["compiler"] = info.compiler;
        facts["cuda"] = info.cuda;
        facts["cuda_version"] = info.cuda ? py::object(py::str(info.cuda_version)) : py::object(py::none());
        facts["architectures"] = info.architectures;
        facts["cpu_features"] = info.cpu_features;
        facts["cpu_isas"] = info.cpu_isas;
        facts["cpu_isa"] = info.cpu_isa;
        facts["threads"] = info.threads;
        return facts;
      },
      "Facts about this build: version, compiler, cuda (bool), cuda_version (str or None), architectures (machine "
      "code and PTX in the library), cpu_features (of this processor), cpu_isas (instruction sets of the CPU "
      "kernels that run here, best last), cpu_isa (the one in use), threads (the CPU kernels' default).");
}
