// Memory of a GPU for faces whose caller brought none. Without CUDA there is none to be had: addresses are null, and
// the launch that follows says so.
#pragma once

#include <cstdint>

namespace twotower::cuda {

// Uninitialised, for what is enqueued on `stream` from now on; begins at a multiple of 256 bytes; null for 0 bytes.
void* allocate(const char* op, int64_t bytes, int device, void* stream);
// Gives it back when all that was enqueued on `stream` is done.
void release(void* memory, int device, void* stream) noexcept;
// `from` may go as soon as this returns.
void copy_to_device(const char* op, void* to, const void* from, int64_t bytes, int device, void* stream);
// What is enqueued on `stream` from now on comes after what `before` has been given so far.
void follow(const char* op, void* stream, void* before, int device);
// Whether the stream records a graph instead of running.
bool is_captured(const char* op, int device, void* stream);

}  // namespace twotower::cuda
