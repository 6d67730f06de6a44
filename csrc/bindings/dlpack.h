// DLPack's binary interface (version 1.1, dmlc.github.io/dlpack), and the capsules in which Python passes it on.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace twotower::dlpack {

namespace py = pybind11;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kCudaManaged = 13 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };

struct Device {
  int32_t type, index;
};
struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct Version {
  uint32_t major, minor;
};
constexpr uint32_t kMajor = 1, kMinor = 1;
constexpr uint64_t kReadOnly = 1, kCopied = 2;
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

constexpr const char *kName = "dltensor", *kUsed = "used_dltensor";
constexpr const char *kVersionedName = "dltensor_versioned", *kVersionedUsed = "used_dltensor_versioned";

// A tensor taken out of a capsule: ours to give back.
class Imported {
 public:
  explicit Imported(const py::capsule& capsule) {
    PyObject* raw = capsule.ptr();
    if (PyCapsule_IsValid(raw, kVersionedName)) {
      versioned_ = static_cast<ManagedVersioned*>(PyCapsule_GetPointer(raw, kVersionedName));
      if (versioned_->version.major > kMajor)
        throw py::value_error("DLPack " + std::to_string(versioned_->version.major) + "." +
                              std::to_string(versioned_->version.minor) + " is newer than the " +
                              std::to_string(kMajor) + "." + std::to_string(kMinor) + " known here");
      PyCapsule_SetName(raw, kVersionedUsed);
    } else if (PyCapsule_IsValid(raw, kName)) {
      plain_ = static_cast<Managed*>(PyCapsule_GetPointer(raw, kName));
      PyCapsule_SetName(raw, kUsed);
    } else {
      throw py::value_error("__dlpack__ gave a capsule that is no DLPack tensor, or one that has been used");
    }
  }
  Imported(Imported&& other) noexcept : plain_(other.plain_), versioned_(other.versioned_) {
    other.plain_ = nullptr;
    other.versioned_ = nullptr;
  }
  Imported& operator=(Imported&&) = delete;
  ~Imported() {
    if (plain_ && plain_->deleter) plain_->deleter(plain_);
    if (versioned_ && versioned_->deleter) versioned_->deleter(versioned_);
  }

  const Tensor& tensor() const { return plain_ ? plain_->tensor : versioned_->tensor; }
  bool read_only() const { return versioned_ && (versioned_->flags & kReadOnly) != 0; }

 private:
  Managed* plain_ = nullptr;
  ManagedVersioned* versioned_ = nullptr;
};

// A capsule for a tensor; `owner` lives until the consumer, or the unused capsule, is done with it.
template <class M, class Owner>
py::capsule capsule_of(const Tensor& tensor, Owner owner) {
  struct Context {
    M managed;
    Owner owner;
  };
  auto* context = new Context{{}, std::move(owner)};
  M& managed = context->managed;
  managed.tensor = tensor;
  managed.context = context;
  managed.deleter = [](M* m) { delete static_cast<Context*>(m->context); };
  constexpr bool kIsVersioned = std::is_same_v<M, ManagedVersioned>;
  if constexpr (kIsVersioned) managed.version = {kMajor, kMinor};
  return py::capsule(&managed, kIsVersioned ? kVersionedName : kName, [](PyObject* raw) {
    const char* name = kIsVersioned ? kVersionedName : kName;
    if (!PyCapsule_IsValid(raw, name)) return;  // taken: its consumer calls the deleter
    auto* unused = static_cast<M*>(PyCapsule_GetPointer(raw, name));
    unused->deleter(unused);
  });
}

}  // namespace twotower::dlpack
