// _C.Array: memory of a result, which any library of arrays can take by DLPack.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "../device_memory.h"
#include "../tensor_view.h"
#include "dlpack.h"

namespace twotower {

namespace py = pybind11;

inline dlpack::Type dlpack_type(DType t) {
  using namespace dlpack;
  constexpr uint8_t codes[] = {kFloat, kFloat, kBfloat, kFloat, kInt, kInt, kBool};
  return {codes[static_cast<int>(t)], static_cast<uint8_t>(8 * size_of(t)), 1};
}

// Memory of our own, uninitialised. On CUDA it is there for what is enqueued on its stream, and is given back in the
// order of that stream, which therefore has to live as long.
class Memory {
 public:
  Memory(const char* op, int64_t bytes, Device device, void* stream) : device_(device), stream_(stream) {
    if (on_gpu()) {
      data_ = cuda::allocate(op, bytes, device.index, stream);
      return;
    }
    constexpr size_t kAlignment = 64;
    data_ = std::aligned_alloc(kAlignment, (static_cast<size_t>(bytes) / kAlignment + 1) * kAlignment);
    if (!data_) throw std::bad_alloc();
  }
  Memory(const Memory&) = delete;
  ~Memory() { on_gpu() ? cuda::release(data_, device_.index, stream_) : std::free(data_); }

  void* data() const { return data_; }
  Device device() const { return device_; }
  bool on_gpu() const { return device_.type == Device::Type::cuda; }

  // From now on the memory is another stream's, whose work comes after what the one before has been given so far.
  void pass_to(void* stream) {
    if (stream == stream_) return;
    cuda::follow("__dlpack__", stream, stream_, device_.index);
    stream_ = stream;
  }

 private:
  Device device_;
  void* stream_;
  void* data_;
};

// Contiguous. Copies share the memory.
class Array {
 public:
  Array(DType dtype, std::vector<int64_t> shape, std::shared_ptr<Memory> memory)
      : dtype_(dtype), shape_(std::move(shape)), memory_(std::move(memory)) {
    int64_t stride = 1;
    strides_.resize(shape_.size());
    for (size_t i = shape_.size(); i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }

  DType dtype() const { return dtype_; }
  const std::vector<int64_t>& shape() const { return shape_; }
  void* data() const { return memory_->data(); }
  py::tuple dlpack_device() const {
    const int type = memory_->on_gpu() ? dlpack::kCuda : dlpack::kCpu;
    return py::make_tuple(type, memory_->device().index);
  }
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
    if (!dl_device.is_none() && !dl_device.equal(dlpack_device()))
      throw py::buffer_error("__dlpack__: the array is on " + memory_->device().name() +
                             " and can be had nowhere else");
    if (!copy.is_none() && py::cast<bool>(copy)) throw py::buffer_error("__dlpack__: copies are not made");
    hand_over(stream);
    Array owner = *this;
    const dlpack::Device device{memory_->on_gpu() ? dlpack::kCuda : dlpack::kCpu, memory_->device().index};
    dlpack::Tensor t{data(), device, static_cast<int32_t>(shape_.size()), dlpack_type(dtype_), nullptr, nullptr, 0};
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
  // To the stream that the consumer names as DLPack has it: None and 1 the default one, -1 none that should wait.
  void hand_over(const py::object& stream) const {
    if (!memory_->on_gpu()) {
      if (!stream.is_none()) throw py::value_error("__dlpack__: stream must be None on the CPU");
      return;
    }
    if (!stream.is_none() && !py::isinstance<py::int_>(stream))
      throw py::type_error("__dlpack__: stream must be an int or None, got " +
                           py::cast<std::string>(py::type::of(stream).attr("__name__")));
    const int64_t address = stream.is_none() ? 1 : py::cast<int64_t>(stream);
    if (address == 0 || address < -1)
      throw py::value_error("__dlpack__: stream must be None, -1, 1, 2 or the address of a CUDA stream, got " +
                            std::to_string(address));
    if (address > 0) memory_->pass_to(address == 1 ? nullptr : reinterpret_cast<void*>(address));
  }

  DType dtype_;
  std::vector<int64_t> shape_, strides_;
  std::shared_ptr<Memory> memory_;
  bool bits_ = false;
};

}  // namespace twotower
