// _C.Array: memory of a result on the CPU, which any library of arrays can take by DLPack.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "../tensor_view.h"
#include "dlpack.h"

namespace twotower {

namespace py = pybind11;

inline int64_t size_of(DType t) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(t)];
}

inline dlpack::Type dlpack_type(DType t) {
  using namespace dlpack;
  constexpr uint8_t codes[] = {kFloat, kFloat, kBfloat, kFloat, kInt, kInt, kBool};
  return {codes[static_cast<int>(t)], static_cast<uint8_t>(8 * size_of(t)), 1};
}

// Contiguous; uninitialised at first. Copies share the memory.
class Array {
 public:
  Array(DType dtype, std::vector<int64_t> shape) : dtype_(dtype), shape_(std::move(shape)) {
    constexpr size_t kAlignment = 64;
    int64_t bytes = size_of(dtype);
    for (const int64_t n : shape_) bytes *= n;
    const size_t rounded = (static_cast<size_t>(bytes) / kAlignment + 1) * kAlignment;
    void* p = std::aligned_alloc(kAlignment, rounded);
    if (!p) throw std::bad_alloc();
    data_ = std::shared_ptr<void>(p, std::free);
    int64_t stride = 1;
    strides_.resize(shape_.size());
    for (size_t i = shape_.size(); i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }

  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  void* data() const { return data_.get(); }
  bool as_bits() const { return bits_; }
  const char* dtype_name() const { return bits_ ? "uint16" : twotower::dtype_name(dtype_); }

  // The same memory as unsigned integers: NumPy takes no bfloat16.
  Array bits() const {
    if (dtype_ != DType::bf16) throw py::value_error(std::string("bits: for bfloat16 alone, this is ") + dtype_name());
    Array same = *this;
    same.bits_ = true;
    return same;
  }

  py::capsule export_capsule(const py::object& stream, const py::object& max_version, const py::object& dl_device,
                             const py::object& copy) const {
    if (!stream.is_none()) throw py::value_error("__dlpack__: stream must be None on the CPU");
    if (!dl_device.is_none() && !dl_device.equal(py::make_tuple(static_cast<int>(dlpack::kCpu), 0)))
      throw py::buffer_error("__dlpack__: the array is on the CPU and can be had nowhere else");
    if (!copy.is_none() && py::cast<bool>(copy)) throw py::buffer_error("__dlpack__: copies are not made");
    Array owner = *this;
    dlpack::Tensor t{
        data_.get(), {dlpack::kCpu, 0}, static_cast<int32_t>(shape_.size()), dlpack_type(dtype_), nullptr, nullptr, 0};
    if (bits_) t.dtype.code = dlpack::kUInt;
    struct Owner {  // shape and strides live as long as the export
      std::unique_ptr<Array> array;
    };
    Owner kept{std::make_unique<Array>(std::move(owner))};
    t.shape = kept.array->shape_.data();
    t.strides = kept.array->strides_.data();
    const bool versioned =
        !max_version.is_none() && py::cast<uint32_t>(py::cast<py::tuple>(max_version)[0]) >= dlpack::kMajor;
    return versioned ? dlpack::capsule_of<dlpack::ManagedVersioned>(t, std::move(kept))
                     : dlpack::capsule_of<dlpack::Managed>(t, std::move(kept));
  }

 private:
  DType dtype_;
  std::vector<int64_t> shape_, strides_;
  std::shared_ptr<void> data_;
  bool bits_ = false;
};

}  // namespace twotower
