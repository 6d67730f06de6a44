// Face of the torch binding: turns torch tensors into TensorViews and lets torch allocate the results.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <deque>
#include <optional>

#include "../cpu/parallel.h"
#include "../ops/ops.h"

namespace twotower {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The emulated library of the tests takes the host's tensors for a GPU's, so that all checks are those of CUDA.
#if defined(TWOTOWER_EMULATED)
constexpr Device::Type kHostTensors = Device::Type::cuda;
#else
constexpr Device::Type kHostTensors = Device::Type::cpu;
#endif

inline std::optional<DType> dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::Int:
      return DType::i32;
    case ScalarType::Long:
      return DType::i64;
    case ScalarType::Bool:
      return DType::boolean;
    default:
      return std::nullopt;
  }
}

inline ScalarType scalar_type_of(DType t) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half,
                                  ScalarType::Int,   ScalarType::Long,   ScalarType::Bool};
  return types[static_cast<int>(t)];
}

// The current CUDA stream of a device. The symbol lives in libtorch_cuda, which a CPU-only torch does not have: it is
// looked up at run time, so that this library loads beside either.
inline void* current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Getter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0)
    throw std::runtime_error("twotower: this torch does not tell its current CUDA stream");
  return stream;
}

// A string argument, whose memory is ours to give back. (Torch 2.11 to 2.13 leak the copy that they make for a
// parameter of type std::string, at every call.)
inline std::string text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string copy(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return copy;
}

// Torch's own threads.
inline void torch_team(int64_t n, cpu::Body body, const void* context) {
  torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

// One call of one op: its device is current while it lives, and the tensors it made or copied stay alive.
class TorchFace final : public Face {
 public:
  TorchFace(const char* op, const Tensor& anchor) : op_(op), device_(anchor.device()) {
    if (device_.type() == torch::headeronly::DeviceType::CUDA) {
      guard_.emplace(device_.index());
      stream_ = current_stream(device_.index());
    } else {
      cpu::use_threads(static_cast<int>(torch::stable::get_num_threads()), torch_team);
    }
  }

  // The tensor as it is.
  TensorView describe(const char* name, const Tensor& t) const {
    const std::optional<DType> dtype = dtype_of(t.scalar_type());
    if (!dtype) refuse(name, "be floating point, int32, int64 or bool", toString(t.scalar_type()));
    if (t.dim() > kMaxDims) refuse(name, "have at most 6 axes", std::to_string(t.dim()));
    using torch::headeronly::DeviceType;
    const auto type = t.device().type();
    TensorView v;
    v.data = const_cast<void*>(t.const_data_ptr());
    v.dtype = *dtype;
    v.ndim = static_cast<int>(t.dim());
    v.device.type = type == DeviceType::CPU    ? kHostTensors
                    : type == DeviceType::CUDA ? Device::Type::cuda
                                               : Device::Type::other;
    v.device.index = type == DeviceType::CPU ? 0 : t.device().index();
    for (int i = 0; i < v.ndim; ++i) {
      v.shape[i] = t.size(i);
      v.strides[i] = t.stride(i);
    }
    return v;
  }
  TensorView describe(const char* name, const OptionalTensor& t) const { return t ? describe(name, *t) : TensorView{}; }

  // Kernels read any outer strides but want the innermost axis contiguous: other layouts are copied once, here.
  TensorView view(const char* name, const Tensor& t) {
    if (t.dim() > 0 && t.size(-1) > 1 && t.stride(-1) != 1)
      return describe(name, copies_.emplace_back(torch::stable::contiguous(t)));
    return describe(name, t);
  }
  TensorView view(const char* name, const OptionalTensor& t) { return t ? view(name, *t) : TensorView{}; }

  TensorView output(int slot, DType dtype, Device, std::initializer_list<int64_t> shape) override {
    outputs_.at(slot) =
        torch::stable::empty({shape.begin(), shape.size()}, scalar_type_of(dtype), std::nullopt, device_);
    return describe("output", *outputs_[slot]);
  }
  void* workspace(int64_t bytes) override {
    if (bytes == 0) return nullptr;
    return copies_.emplace_back(torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, device_))
        .mutable_data_ptr();
  }
  void* stream() const override { return stream_; }

  const Tensor& result(int slot) const { return outputs_.at(slot).value(); }
  const OptionalTensor& optional_result(int slot) const { return outputs_.at(slot); }

 private:
  [[noreturn]] void refuse(const char* name, const char* expected, const std::string& got) const {
    throw std::invalid_argument(std::string(op_) + ": " + name + " must " + expected + ", got " + got);
  }

  const char* op_;
  torch::stable::Device device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
  std::deque<Tensor> copies_;  // and workspace
  std::array<OptionalTensor, 5> outputs_;
};

}  // namespace twotower
