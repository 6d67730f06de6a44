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
        facts["threads"] = info.threads;
        return facts;
      },
      "Facts about this build: version, compiler, cuda (bool), cuda_version (str or None), architectures (machine "
      "code and PTX in the library), cpu_features (of this processor), threads (the CPU kernels' default).");
}
