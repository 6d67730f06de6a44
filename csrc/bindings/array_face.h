// Face of the pybind11 binding: takes arrays of any library by DLPack, and gives results as `out` arrays or as Arrays.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
#include "../ops/ops.h"
#include "array.h"

namespace twotower {

// What a call asks for beside the op's arguments.
struct Call {
  py::object out, workspace, stream, dtype;
};

// One call of one op. Everything it imports stays alive until it ends.
class ArrayFace final : public Face {
 public:
  ArrayFace(const char* op, int results, const Call& call);

  // An argument as the op wants it, named for errors. `optional` may be None.
  TensorView view(const char* name, const py::object& array);
  TensorView optional(const char* name, const py::object& array);
  // int64: of int32 a copy is made, on the CPU alone; where a number is given, one of `like`'s rows, counting up by
  // `step`, on its device.
  TensorView ids(const char* name, const py::object& array);
  TensorView per_row(const char* name, const py::object& value, const TensorView& like, int64_t step);
  int64_t integer(const char* name, const py::object& value) const;
  double number(const char* name, const py::object& value) const;
  bool flag(const char* name, const py::object& value) const;
  std::string text(const char* name, const py::object& value) const;

  // Runs the op without Python's lock, on the device of `anchor`; its results, a tuple where it has several.
  py::object run(const TensorView& anchor, const std::function<void()>& op);

  TensorView output(int slot, DType dtype, Device device, std::initializer_list<int64_t> shape) override;
  void* workspace(int64_t bytes) override;
  void* stream() const override { return stream_; }

  // While this is set on a thread, ops say there what workspace they want, and compute nothing.
  static thread_local int64_t* asked_workspace;

 private:
  struct Measured {};
  struct Result {
    py::object given;          // of `out`, or None
    TensorView view;           // of it
    std::optional<Array> own;  // where none was given
    bool is_written = false;
  };

  [[noreturn]] void refuse(const char* name, const std::string& expected, const std::string& got) const;
  [[noreturn]] void refuse_type(const char* name, const char* expected, const py::object& got) const;
  TensorView import(const char* name, const py::object& array, bool to_write);
  TensorView describe(const char* name, const dlpack::Tensor& t) const;
  void take_results(const py::object& out);
  void refuse_overlaps() const;
  // Of our own; where the stream is being captured, there must have been `expected`, which was `got`.
  std::shared_ptr<Memory> memory(const char* name, int64_t bytes, Device device, const std::string& expected,
                                 const char* got) const;

  const char* op_;
  void* stream_ = nullptr;
  bool bits_are_bfloat16_ = false;
  std::deque<dlpack::Imported> imported_;
  std::deque<std::vector<int64_t>> made_;  // of numbers and int32 ids
  std::vector<std::pair<std::string, TensorView>> inputs_;
  std::vector<Result> results_;
  TensorView workspace_;
  std::vector<std::shared_ptr<Memory>> scratch_;  // on the GPU: numbers, workspace
};

// Adds every op to the module.
void define_array_ops(py::module_& m);

}  // namespace twotower
