// Memory for faces whose caller brought none (device_memory.h).
#include "../device_memory.h"
#include "../simt/memory.h"

namespace twotower::cuda {
namespace {

// A device is the current one while this lives.
class Current {
 public:
  Current(const char* op, int device) : op_(op), before_(simt::use_device(op, device)) {}
  Current(const Current&) = delete;
  ~Current() {
    try {
      simt::use_device(op_, before_);
    } catch (const std::exception&) {  // a device that was current a moment ago can only go with the process
    }
  }

 private:
  const char* op_;
  int before_;
};

}  // namespace

void* allocate(const char* op, int64_t bytes, int device, void* stream) {
  if (bytes == 0) return nullptr;
  const Current current(op, device);
  return simt::allocate(op, static_cast<size_t>(bytes), stream);
}

void release(void* memory, int device, void* stream) noexcept {
  if (!memory) return;
  try {
    const Current current("twotower", device);
    simt::release("twotower", memory, stream);
  } catch (const std::exception&) {  // at the end of the process the driver is gone, and the memory with it
  }
}

void copy_to_device(const char* op, void* to, const void* from, int64_t bytes, int device, void* stream) {
  if (bytes == 0) return;
  const Current current(op, device);
  simt::copy_to_device(op, to, from, static_cast<size_t>(bytes), stream);
}

void follow(const char* op, void* stream, void* before, int device) {
  const Current current(op, device);
  simt::follow(op, stream, before);
}

bool is_captured(const char* op, int device, void* stream) {
  const Current current(op, device);
  return simt::is_captured(op, stream);
}

}  // namespace twotower::cuda
