// Argument checks shared by all ops. Every message reads "op: argument must ..., got ...".
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../build_info.h"
#include "../params.h"
#include "ops.h"

namespace twotower::ops {

// An axis length: unknown until the first tensor that has the axis binds it, then required of every other tensor.
struct Dim {
  Dim(const char* name) : name(name) {}                               // NOLINT: bound by the first tensor
  Dim(const char* name, int64_t value) : name(name), value(value) {}  // required from the start
  Dim(int64_t value) : name(nullptr), value(value) {}                 // NOLINT: a plain number
  operator int64_t() const { return value; }

  const char* name;
  int64_t value = -1;
  const char* bound_by = nullptr;
};

class Check {
 public:
  // `anchor` is the argument whose device and dtype the others have to match.
  Check(const char* op, const char* anchor_name, const TensorView& anchor)
      : op_(op), anchor_name_(anchor_name), anchor_(anchor) {
    if (anchor.device.type == Device::Type::other) fail(anchor_name, "be on a CPU or CUDA device", "another device");
  }

  const char* op() const { return op_; }

  template <class... Parts>
  [[noreturn]] void fail(const char* arg, const char* expected, const Parts&... got) const {
    std::ostringstream s;
    s << op_ << ": " << arg << " must " << expected << ", got ";
    (s << ... << got);
    throw std::invalid_argument(s.str());
  }

  void require(bool ok, const char* arg, const char* expected, auto&&... got) const {
    if (!ok) fail(arg, expected, got...);
  }

  // The anchor itself: any floating dtype.
  void floating(const TensorView& t, std::initializer_list<Dim*> shape) const {
    require(is_floating(t.dtype), anchor_name_, "be float32, bfloat16, float16 or float64", dtype_name(t.dtype));
    if (t.dtype == DType::f64 && t.device.type != Device::Type::cpu)
      fail(anchor_name_, "be float32, bfloat16 or float16 on CUDA", "float64");
    shape_of(anchor_name_, t, shape);
  }
  // Same dtype as the anchor, or its accumulator dtype, or the given one.
  void like(const char* arg, const TensorView& t, std::initializer_list<Dim*> shape) const {
    typed(arg, t, anchor_.dtype, shape, true);
  }
  void accumulator(const char* arg, const TensorView& t, std::initializer_list<Dim*> shape) const {
    typed(arg, t, acc_dtype(anchor_.dtype), shape, true);
  }
  void typed(const char* arg, const TensorView& t, DType dtype, std::initializer_list<Dim*> shape,
             bool because_of_anchor = false) const {
    device(arg, t);
    if (t.dtype != dtype) {
      const std::string expected =
          std::string("be ") + dtype_name(dtype) +
          (because_of_anchor ? std::string(" to go with ") + dtype_name(anchor_.dtype) + " " + anchor_name_ : "");
      fail(arg, expected.c_str(), dtype_name(t.dtype));
    }
    shape_of(arg, t, shape);
  }
  void contiguous(const char* arg, const TensorView& t) const {
    require(t.contiguous(), arg, "be contiguous", "a strided view");
  }
  void device(const char* arg, const TensorView& t) const {
    if (t.device == anchor_.device) return;
    const std::string expected = "be on " + anchor_.device.name() + " with " + anchor_name_;
    fail(arg, expected.c_str(), t.device.name());
  }
  void shape_of(const char* arg, const TensorView& t, std::initializer_list<Dim*> shape) const;
  bool on_cpu() const { return anchor_.device.type == Device::Type::cpu; }

  const TensorView& anchor() const { return anchor_; }

 private:
  const char* op_;
  const char* anchor_name_;
  const TensorView& anchor_;
};

template <int N>
Rows<N> rows(const TensorView& t) {
  Rows<N> r;
  if (!t) return r;
  static char nothing;  // an empty tensor may have no memory, yet it is there, and kernels step along its rows
  r.data = t.data ? t.data : &nothing;
  for (int i = 0; i < N; ++i) r.stride[i] = t.strides[i];
  return r;
}

// One of the named values of a string argument.
template <class E>
struct Choice {
  const char* name;
  E value;
};
template <class E>
E choose(const Check& check, const char* arg, std::string_view given, std::initializer_list<Choice<E>> choices) {
  std::string expected = "be one of";
  for (const auto& c : choices) {
    if (given == c.name) return c.value;
    expected += std::string(" '") + c.name + "'";
  }
  check.fail(arg, expected.c_str(), "'", given, "'");
}

// A function of the CUDA backend, or null where this build has none.
#if defined(TWOTOWER_WITH_CUDA)
#define TWOTOWER_CUDA(f) (&f)
#else
#define TWOTOWER_CUDA(f) nullptr
#endif

// Runs the kernel of the device that holds the anchor; a CUDA kernel gets its workspace from the face.
template <class P>
void launch(const Check& check, Face& face, P params, void (*cpu)(const P&),
            std::type_identity_t<void (*)(const P&, void*)> cuda,
            std::type_identity_t<int64_t (*)(const P&)> workspace = nullptr) {
  if (check.on_cpu()) return cpu(params);
  if (!cuda)
    throw std::runtime_error(std::string(check.op()) + ": no CUDA kernel for " + check.anchor().device.name() +
                             cuda::architecture_of(check.anchor().device.index) + " in this build (" +
                             cuda_build_description() + "); use CPU tensors");
  if constexpr (requires { params.workspace; })
    params.workspace = face.workspace(workspace ? workspace(params) : 0);
  else
    face.workspace(0);
  cuda(params, face.stream());
}

}  // namespace twotower::ops
