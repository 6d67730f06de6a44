#include "check.h"

namespace twotower::ops {

void Check::shape_of(const char* arg, const TensorView& t, std::initializer_list<Dim*> shape) const {
  bool ok = t.ndim == static_cast<int>(shape.size());
  const char* because = nullptr;  // the argument that fixed the axis length t disagrees with
  if (ok) {
    int axis = 0;
    for (const Dim* d : shape) {
      const int64_t size = t.shape[axis++];
      if (d->value >= 0 && d->value != size) {
        ok = false;
        because = d->bound_by;
        break;
      }
    }
  }
  if (!ok) {
    std::string expected = "have shape (";
    for (const Dim* d : shape) {
      if (expected.back() != '(') expected += ", ";
      expected += d->value >= 0 ? std::to_string(d->value) : d->name;
    }
    expected += shape.size() == 1 ? ",)" : ")";
    if (because) expected += std::string(" to match ") + because;
    fail(arg, expected.c_str(), t.shape_name());
  }
  int axis = 0;
  for (Dim* d : shape) {
    if (d->value < 0) {
      d->value = t.shape[axis];
      d->bound_by = arg;
    }
    ++axis;
  }
  if (t.ndim > 0 && t.shape[t.ndim - 1] > 1 && t.strides[t.ndim - 1] != 1 && t.numel() > 0)
    fail(arg, "be contiguous along its last axis", "stride ", t.strides[t.ndim - 1]);
}

}  // namespace twotower::ops
