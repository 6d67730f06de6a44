// The one entry point: launches a kernel by name.
#include <exception>
#include <string>

#include "primitives.h"

namespace twotower::primitives {
namespace {

const Entry& find(const std::string& name) {
  for (const auto entries : {thread_entries(), warp_entries(), atomic_entries(), shared_entries(), matrix_entries(),
                             vector_entries(), sum_entries(), tile_entries(), sm90_entries(), planted_entries()})
    for (const Entry& entry : entries)
      if (name == entry.name) return entry;
  throw std::invalid_argument("no primitive is called " + name);
}

void launch(const Entry& entry, const uint32_t* in, uint32_t* out, int64_t n, void* stream) {
  if (entry.launch != nullptr) return entry.launch(entry, in, out, n, stream);
  if (entry.room == nullptr) {
    simt::launch(entry.name, entry.kernel, entry.blocks, entry.threads, entry.shared, stream, in, out, n);
    return;
  }
  if (entry.room(entry.threads, entry.shared) < entry.blocks)
    throw std::runtime_error(std::string(entry.name) + ": the device holds fewer blocks at once");
  simt::launch_coresident(entry.name, entry.kernel, entry.blocks, entry.threads, entry.shared, stream, in, out, n);
}

}  // namespace
}  // namespace twotower::primitives

// Null, or what went wrong; the text lives until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* twotower_primitive(const char* name, const void* in,
                                                                                 void* out, int64_t n, void* stream) {
  using namespace twotower::primitives;
  thread_local std::string problem;
  try {
    launch(find(name), static_cast<const uint32_t*>(in), static_cast<uint32_t*>(out), n, stream);
    return nullptr;
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
}
