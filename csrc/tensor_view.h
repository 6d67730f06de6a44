// TensorView: the one tensor type of the C++ core. It borrows memory; a face (torch, DLPack) owns it.
#pragma once

#include <cstdint>
#include <string>

namespace twotower {

enum class DType : int8_t { f32, f64, bf16, f16, i32, i64, boolean };

inline const char* dtype_name(DType t) {
  constexpr const char* names[] = {"float32", "float64", "bfloat16", "float16", "int32", "int64", "bool"};
  return names[static_cast<int>(t)];
}

// Bytes of an element.
inline int64_t size_of(DType t) {
  constexpr int64_t sizes[] = {4, 8, 2, 2, 4, 8, 1};
  return sizes[static_cast<int>(t)];
}

inline bool is_floating(DType t) {
  return t <= DType::f16;
}

// Accumulators, states, statistics: float64 for float64 inputs (gradient checks), float32 for all others.
inline DType acc_dtype(DType t) {
  return t == DType::f64 ? DType::f64 : DType::f32;
}

struct Device {
  enum class Type : int8_t { cpu, cuda, other };  // other: never valid, kept so that it can be refused by name
  Type type = Type::cpu;
  int index = 0;

  bool operator==(const Device&) const = default;
  std::string name() const {
    if (type == Type::cpu) return "cpu";
    return (type == Type::cuda ? "cuda:" : "device:") + std::to_string(index);
  }
};

constexpr int kMaxDims = 6;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device;
  int ndim = -1;  // -1: absent (an optional argument not given)
  int64_t shape[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in elements

  explicit operator bool() const { return ndim >= 0; }

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }

  bool contiguous() const {
    if (numel() == 0) return true;
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && strides[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }

  std::string shape_name() const {
    std::string s = "(";
    for (int i = 0; i < ndim; ++i) {
      if (i > 0) s += ", ";
      s += std::to_string(shape[i]);
    }
    s += ndim == 1 ? ",)" : ")";
    return s;
  }
};

}  // namespace twotower
