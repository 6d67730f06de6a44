// Names the source lines of an address, for reports.
#include <dlfcn.h>

#include <cstdio>

#include "runtime.h"

namespace twotower::simt::emulated {

// The chain of inlined calls, innermost first, without the emulator's own wrappers: "tile.h:130 < moe.cuh:99".
std::string source_line(uintptr_t pc) {
  Dl_info info{};
  if (pc == 0 || !dladdr(reinterpret_cast<void*>(pc), &info)) return "an unknown line";
  const uintptr_t offset = pc - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;  // within the call
  char command[1024];
  std::snprintf(command, sizeof command, "env -u LD_PRELOAD addr2line -i -s -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                offset);
  FILE* pipe = popen(command, "r");
  if (!pipe) return "an unknown line";
  std::string chain;
  char line[512];
  while (std::fgets(line, sizeof line, pipe)) {
    std::string frame(line);
    frame.resize(frame.find_first_of(" \n"));
    if (frame.starts_with("emulator") || frame.starts_with("tuple") || frame.starts_with("invoke.h")) continue;
    chain += (chain.empty() ? "" : " < ") + frame;
  }
  pclose(pipe);
  return chain.empty() ? "an unknown line" : chain;
}

}  // namespace twotower::simt::emulated
