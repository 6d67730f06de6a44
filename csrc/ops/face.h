// What an op needs from the face that called it (torch or DLPack): memory for results, and where to run.
#pragma once

#include <initializer_list>

#include "../tensor_view.h"

namespace twotower {

class Face {
 public:
  // A new contiguous, uninitialised tensor on `device`; `slot` is its place among the op's results.
  virtual TensorView output(int slot, DType dtype, Device device, std::initializer_list<int64_t> shape) = 0;
  // Uninitialised device memory for the kernels of this call; it begins at a multiple of 256 bytes. Every launch of a
  // CUDA kernel asks first, one that needs none for 0 bytes: a face that wants to know the bytes alone throws here.
  virtual void* workspace(int64_t bytes) = 0;
  virtual void* stream() const { return nullptr; }  // the CUDA stream to enqueue on

 protected:
  ~Face() = default;
};

}  // namespace twotower
