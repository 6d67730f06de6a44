#include "array_face.h"

#include "../params.h"

namespace twotower {
namespace {

std::string type_of(const py::object& value) {
  return py::cast<std::string>(py::type::of(value).attr("__name__"));
}

std::string type_name(const dlpack::Type& t) {
  const std::string bits = std::to_string(t.bits);
  switch (t.code) {
    case dlpack::kInt:
      return "int" + bits;
    case dlpack::kUInt:
      return "uint" + bits;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kBool:
      return "bool";
    default:
      return "DLPack type " + std::to_string(t.code) + " of " + bits + " bits";
  }
}

std::optional<DType> dtype_of(const dlpack::Type& t) {
  if (t.lanes != 1) return std::nullopt;
  for (const DType known : {DType::f32, DType::f64, DType::bf16, DType::f16, DType::i32, DType::i64, DType::boolean})
    if (const dlpack::Type wanted = dlpack_type(known); wanted.code == t.code && wanted.bits == t.bits) return known;
  return std::nullopt;
}

// The bytes between a view's first and its last element.
std::pair<uintptr_t, uintptr_t> extent(const TensorView& v) {
  uintptr_t low = reinterpret_cast<uintptr_t>(v.data), high = low;
  if (v.numel() == 0) return {low, low};
  for (int i = 0; i < v.ndim; ++i) {
    const int64_t bytes = (v.shape[i] - 1) * v.strides[i] * size_of(v.dtype);
    (bytes < 0 ? low : high) += static_cast<uintptr_t>(bytes);
  }
  return {low, high + size_of(v.dtype)};
}

// Its device is the current one while it lives; none where the index is negative.
class UsedDevice {
 public:
  explicit UsedDevice(int index) : before_(index < 0 ? -1 : cuda::use_device(index)) {}
  UsedDevice(const UsedDevice&) = delete;
  ~UsedDevice() {
    if (before_ >= 0) cuda::use_device(before_);
  }

 private:
  int before_;
};

}  // namespace

thread_local int64_t* ArrayFace::asked_workspace = nullptr;

ArrayFace::ArrayFace(const char* op, int results, const Call& call) : op_(op), results_(results) {
  if (!call.dtype.is_none()) {
    if (text("dtype", call.dtype) != "bfloat16")
      refuse("dtype", "be 'bfloat16', which says what uint16 arrays hold, or None",
             "'" + text("dtype", call.dtype) + "'");
    bits_are_bfloat16_ = true;
  }
  if (!call.stream.is_none()) {
    const int64_t stream = integer("stream", call.stream);
    if (stream < 0) refuse("stream", "be the address of a CUDA stream, or None", std::to_string(stream));
    stream_ = reinterpret_cast<void*>(static_cast<uintptr_t>(stream));
  }
  if (!call.workspace.is_none()) {
    workspace_ = import("workspace", call.workspace, true);
    if (!workspace_.contiguous()) refuse("workspace", "be contiguous", "a strided array");
  }
  take_results(call.out);
}

void ArrayFace::refuse(const char* name, const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(std::string(op_) + ": " + name + " must " + expected + ", got " + got);
}

void ArrayFace::refuse_type(const char* name, const char* expected, const py::object& got) const {
  throw py::type_error(std::string(op_) + ": " + name + " must be " + expected + ", got " + type_of(got));
}

TensorView ArrayFace::view(const char* name, const py::object& array) {
  inputs_.emplace_back(name, import(name, array, false));
  return inputs_.back().second;
}

TensorView ArrayFace::optional(const char* name, const py::object& array) {
  return array.is_none() ? TensorView{} : view(name, array);
}

TensorView ArrayFace::ids(const char* name, const py::object& array) {
  TensorView v = view(name, array);
  if (v.dtype != DType::i32 || v.device.type != Device::Type::cpu || v.ndim > 2) return v;
  std::vector<int64_t>& wide = made_.emplace_back(static_cast<size_t>(v.numel()));
  const int64_t columns = v.ndim > 0 ? v.shape[v.ndim - 1] : 1;
  for (int64_t i = 0; i < v.numel(); ++i) {
    const int64_t row = v.ndim == 2 ? i / columns * v.strides[0] : 0;
    wide[i] = static_cast<const int32_t*>(v.data)[row + i % columns];
  }
  v.data = wide.data();
  v.dtype = DType::i64;
  if (v.ndim == 2) v.strides[0] = columns;
  return v;
}

TensorView ArrayFace::per_row(const char* name, const py::object& value, const TensorView& like, int64_t step) {
  if (!py::isinstance<py::int_>(value) || py::isinstance<py::bool_>(value)) {
    if (!py::hasattr(value, "__dlpack__")) refuse_type(name, "an int or an array", value);
    return ids(name, value);
  }
  const int64_t first = integer(name, value), rows = like.ndim > 0 ? like.shape[0] : 0;
  std::vector<int64_t>& made = made_.emplace_back(static_cast<size_t>(rows));
  for (int64_t b = 0; b < rows; ++b)  // wraps around, as int64 tensors do
    made[b] = static_cast<int64_t>(static_cast<uint64_t>(first) + static_cast<uint64_t>(b * step));
  TensorView v;
  v.data = made.data();
  if (like.device.type == Device::Type::cuda) {
    v.device = like.device;
    v.data = nullptr;
    if (!asked_workspace) {
      const int64_t bytes = rows * size_of(DType::i64);
      scratch_.push_back(memory(name, bytes, v.device, "be an int64 array on " + v.device.name(), "an int"));
      v.data = scratch_.back()->data();
      cuda::copy_to_device(op_, v.data, made.data(), bytes, v.device.index, stream_);
    }
  }
  v.dtype = DType::i64;
  v.ndim = 1;
  v.shape[0] = rows;
  v.strides[0] = 1;
  return v;
}

int64_t ArrayFace::integer(const char* name, const py::object& value) const {
  if (py::isinstance<py::bool_>(value) || !PyIndex_Check(value.ptr())) refuse_type(name, "an int", value);
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
  if (!number) throw py::error_already_set();
  int overflow = 0;
  const int64_t result = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) refuse(name, "fit 64 bits", py::cast<std::string>(py::str(value)));
  return result;
}

double ArrayFace::number(const char* name, const py::object& value) const {
  if (py::isinstance<py::bool_>(value) || !PyNumber_Check(value.ptr()) || py::hasattr(value, "__dlpack__"))
    refuse_type(name, "a number", value);
  const double result = PyFloat_AsDouble(value.ptr());
  if (PyErr_Occurred()) {
    PyErr_Clear();
    refuse_type(name, "a number", value);
  }
  return result;
}

bool ArrayFace::flag(const char* name, const py::object& value) const {
  if (!py::isinstance<py::bool_>(value)) refuse_type(name, "a bool", value);
  return py::cast<bool>(value);
}

std::string ArrayFace::text(const char* name, const py::object& value) const {
  if (!py::isinstance<py::str>(value)) refuse_type(name, "a str", value);
  return py::cast<std::string>(value);
}

// Asks for a capsule of the newest version that both sides know; libraries from before 2024 know no versions.
TensorView ArrayFace::import(const char* name, const py::object& array, bool to_write) {
  if (!py::hasattr(array, "__dlpack__") || !py::hasattr(array, "__dlpack_device__"))
    refuse_type(name, "an array that speaks DLPack (NumPy, JAX, CuPy, torch, ...)", array);
  py::object capsule;
  try {
    const auto device = py::cast<std::pair<int, int>>(array.attr("__dlpack_device__")());
    py::dict with;
    if (device.first == dlpack::kCuda || device.first == dlpack::kCudaManaged)
      with["stream"] = stream_ ? reinterpret_cast<uintptr_t>(stream_) : uintptr_t{1};  // 1: the default stream
    py::dict versioned(**with);
    versioned["max_version"] = py::make_tuple(dlpack::kMajor, dlpack::kMinor);
    try {
      capsule = array.attr("__dlpack__")(**versioned);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      capsule = array.attr("__dlpack__")(**with);
    }
  } catch (py::error_already_set& error) {
    const std::string why = py::cast<std::string>(py::str(error.value()));
    refuse(name, "be exchangeable by DLPack", type_of(error.value()) + ": " + why);
  }
  if (!py::isinstance<py::capsule>(capsule)) refuse_type(name, "an array whose __dlpack__ gives a capsule", capsule);
  try {
    imported_.emplace_back(py::reinterpret_borrow<py::capsule>(capsule));
  } catch (const py::value_error& error) {
    refuse(name, "be exchangeable by DLPack", error.what());
  }
  const dlpack::Imported& taken = imported_.back();
  if (to_write && taken.read_only()) refuse(name, "be writable", "a read-only array");
  return describe(name, taken.tensor());
}

TensorView ArrayFace::describe(const char* name, const dlpack::Tensor& t) const {
  TensorView v;
  const bool bits = t.dtype.code == dlpack::kUInt && t.dtype.bits == 16 && t.dtype.lanes == 1;
  const bool bytes = t.dtype.code == dlpack::kUInt && t.dtype.bits == 8 && t.dtype.lanes == 1;
  if (bits && bits_are_bfloat16_)
    v.dtype = DType::bf16;
  else if (bytes && std::string_view(name) == "workspace")
    v.dtype = DType::boolean;  // a byte each
  else if (const std::optional<DType> dtype = dtype_of(t.dtype))
    v.dtype = *dtype;
  else
    refuse(name, "be floating point, int32, int64 or bool",
           type_name(t.dtype) + (bits ? " (dtype='bfloat16' says that it is that)" : ""));
  if (t.ndim < 0 || t.ndim > kMaxDims) refuse(name, "have at most 6 axes", std::to_string(t.ndim));
  using enum Device::Type;
  const bool host = t.device.type == dlpack::kCpu || t.device.type == dlpack::kCudaHost;
  const bool gpu = t.device.type == dlpack::kCuda || t.device.type == dlpack::kCudaManaged;
  v.device = {host ? cpu : gpu ? cuda : other, host ? 0 : t.device.index};
  v.ndim = t.ndim;
  v.data = static_cast<char*>(t.data) + t.byte_offset;
  int64_t contiguous = 1;
  for (int i = v.ndim - 1; i >= 0; --i) {
    if (t.shape[i] < 0) refuse(name, "have lengths of at least 0", std::to_string(t.shape[i]));
    v.shape[i] = t.shape[i];
    v.strides[i] = t.strides ? t.strides[i] : contiguous;
    if (__builtin_mul_overflow(contiguous, t.shape[i] > 0 ? t.shape[i] : 1, &contiguous))
      refuse(name, "have fewer than 2**63 elements", "more");
  }
  if (v.numel() > 0 && !t.data) refuse(name, "point to memory", "a null pointer");
  if (v.numel() > 0 && reinterpret_cast<uintptr_t>(v.data) % static_cast<uintptr_t>(size_of(v.dtype)) != 0)
    refuse(name, std::string("be aligned to the size of ") + dtype_name(v.dtype), "an address between two elements");
  if (v.numel() > 0 && v.ndim > 0 && v.shape[v.ndim - 1] > 1 && v.strides[v.ndim - 1] != 1)
    refuse(name, "be contiguous along its last axis", "a distance of " + std::to_string(v.strides[v.ndim - 1]));
  return v;
}

void ArrayFace::take_results(const py::object& out) {
  for (Result& r : results_) r.given = py::none();
  if (out.is_none()) return;
  const bool several = py::isinstance<py::tuple>(out) || py::isinstance<py::list>(out);
  const auto given = several ? py::reinterpret_borrow<py::sequence>(out) : py::sequence(py::make_tuple(out));
  if (given.size() != results_.size()) {
    const std::string wanted =
        results_.size() == 1 ? "be an array" : "be a tuple of " + std::to_string(results_.size());
    refuse("out", wanted + (results_.size() == 1 ? "" : " arrays, each of them may be None"),
           several ? std::to_string(given.size()) + " of them" : type_of(out));
  }
  for (size_t i = 0; i < results_.size(); ++i) {
    results_[i].given = given[i];
    if (results_[i].given.is_none()) continue;
    results_[i].view = import("out", results_[i].given, true);
  }
}

TensorView ArrayFace::output(int slot, DType dtype, Device device, std::initializer_list<int64_t> shape) {
  Result& r = results_.at(slot);
  TensorView wanted;
  wanted.dtype = dtype;
  wanted.device = device;
  wanted.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), wanted.shape);
  const std::string name = results_.size() == 1 ? "out" : "out[" + std::to_string(slot) + "]";
  if (r.view) {
    const TensorView& v = r.view;
    r.is_written = true;
    if (v.dtype != dtype) refuse(name.c_str(), std::string("be ") + dtype_name(dtype), dtype_name(v.dtype));
    if (v.shape_name() != wanted.shape_name())
      refuse(name.c_str(), "have shape " + wanted.shape_name(), v.shape_name());
    if (v.device != device) refuse(name.c_str(), "be on " + device.name(), v.device.name());
    if (!v.contiguous()) refuse(name.c_str(), "be contiguous", "a strided array");
    refuse_overlaps();
    return v;
  }
  int64_t stride = 1;
  for (int i = wanted.ndim - 1; i >= 0; stride *= wanted.shape[i--]) wanted.strides[i] = stride;
  if (asked_workspace) return wanted;
  const auto made = memory(name.c_str(), wanted.numel() * size_of(dtype), device, "be given", "None");
  wanted.data = r.own.emplace(dtype, std::vector<int64_t>(shape), made).data();
  return wanted;
}

// Memory that a graph allocates would be another one's with every replay.
std::shared_ptr<Memory> ArrayFace::memory(const char* name, int64_t bytes, Device device, const std::string& expected,
                                          const char* got) const {
  if (bytes > 0 && device.type == Device::Type::cuda && cuda::is_captured(op_, device.index, stream_))
    refuse(name, expected + " while the stream is captured, as nothing is allocated then", got);
  return std::make_shared<Memory>(op_, bytes, device, stream_);
}

// A result in the memory of an argument or of another result would be wrong numbers without a word.
void ArrayFace::refuse_overlaps() const {
  std::vector<std::pair<std::string, TensorView>> others = inputs_;
  if (workspace_) others.emplace_back("workspace", workspace_);
  for (size_t i = 0; i < results_.size(); ++i) {
    if (!results_[i].view || results_[i].view.numel() == 0) continue;
    const auto [low, high] = extent(results_[i].view);
    for (const auto& [name, view] : others) {
      const auto [from, to] = extent(view);
      if (view && from < to && low < to && from < high) refuse("out", "have memory of its own", "some of " + name);
    }
    others.emplace_back("another result", results_[i].view);
  }
}

void* ArrayFace::workspace(int64_t bytes) {
  if (asked_workspace) {
    *asked_workspace = bytes;
    throw Measured{};
  }
  if (bytes == 0) return nullptr;
  const Device device = inputs_.front().second.device;
  const std::string wanted = "hold " + std::to_string(bytes) + " bytes, as workspace_bytes() says";
  if (!workspace_) {
    scratch_.push_back(memory("workspace", bytes, device, wanted, "None"));
    return scratch_.back()->data();
  }
  const int64_t held = workspace_.numel() * size_of(workspace_.dtype);
  if (held < bytes) refuse("workspace", wanted, std::to_string(held));
  if (reinterpret_cast<uintptr_t>(workspace_.data) % 256 != 0)
    refuse("workspace", "begin at a multiple of 256 bytes", "another address");
  if (workspace_.device != device) refuse("workspace", "be on " + device.name(), workspace_.device.name());
  return workspace_.data;
}

py::object ArrayFace::run(const TensorView& anchor, const std::function<void()>& op) {
  const bool on_gpu = anchor.device.type == Device::Type::cuda;
  if (asked_workspace) {
    *asked_workspace = 0;
    if (!on_gpu) return py::none();
  }
  bool measured = false;
  {
    const py::gil_scoped_release unlocked;
    cpu::use_threads(0);
    const UsedDevice device(on_gpu && !asked_workspace ? anchor.device.index : -1);
    try {
      op();
    } catch (const Measured&) {
      measured = true;
    }
  }
  if (measured) return py::none();
  for (size_t i = 0; i < results_.size(); ++i)
    if (results_[i].view && !results_[i].is_written)
      refuse(("out[" + std::to_string(i) + "]").c_str(), "be None, as this call has no such result", "an array");
  py::tuple all(results_.size());
  for (size_t i = 0; i < results_.size(); ++i) {
    Result& r = results_[i];
    all[i] = r.view ? r.given : r.own ? py::cast(std::move(*r.own)) : py::object(py::none());
  }
  if (results_.size() == 1) return py::reinterpret_borrow<py::object>(all[0]);
  return all;
}

}  // namespace twotower
