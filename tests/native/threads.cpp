// Ops from several threads at once, on pools of several sizes: the thread sanitizer watches, and every result has to
// have the bits that one thread gives. Ends with 0 where it has.
#include <atomic>
#include <cstdio>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#include "../../csrc/cpu/parallel.h"
#include "../../csrc/ops/ops.h"

namespace {

using namespace twotower;

using Memory = std::vector<float>;

struct HostFace final : Face {
  std::deque<Memory> results;
  TensorView output(int, DType dtype, Device, std::initializer_list<int64_t> shape) override;
  void* workspace(int64_t) override { return nullptr; }
};

TensorView view(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), v.shape);
  int64_t stride = 1;
  for (int i = v.ndim - 1; i >= 0; stride *= v.shape[i--]) v.strides[i] = stride;
  return v;
}

TensorView HostFace::output(int, DType dtype, Device, std::initializer_list<int64_t> shape) {
  int64_t count = 1;
  for (const int64_t n : shape) count *= n;
  return view(results.emplace_back(static_cast<size_t>(2 * count + 16)).data(), dtype, shape);  // up to 8 bytes each
}

// Numbers in [-1, 1), the same for the same seed.
Memory numbers(int64_t count, uint32_t seed) {
  Memory values(static_cast<size_t>(count));
  for (float& v : values) {
    seed = seed * 1664525u + 1013904223u;
    v = static_cast<float>(seed >> 8) / (1 << 23) - 1.f;
  }
  return values;
}

// One call of each op; all that it wrote.
std::deque<Memory> call(int op, uint32_t seed) {
  HostFace face;
  std::deque<Memory> inputs;
  const auto make = [&](std::initializer_list<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t n : shape) count *= n;
    return view(inputs.emplace_back(numbers(count, ++seed)).data(), DType::f32, shape);
  };
  const TensorView none;
  switch (op) {
    case 0: {
      const TensorView x = make({2, 33, 96}), w = make({96}), delta = make({2, 33, 96});
      ops::rms_norm(face, x, w, none, none, delta, none, 1e-5, "none");
      break;
    }
    case 1: {
      const TensorView x = make({40, 64}), up = make({6, 48, 64}), down = make({6, 64, 48}), w = make({40, 2});
      std::vector<int32_t> ids(80);
      for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>((i * 7 + seed) % 6);
      ops::moe_experts(face, x, view(ids.data(), DType::i32, {40, 2}), w, up, down, none, none, "relu2");
      break;
    }
    case 2: {
      const TensorView q = make({1, 4, 17, 32}), k = make({1, 2, 17, 32}), v = make({1, 2, 17, 32});
      ops::block_attention(face, q, k, v, none, none, none, true, 0.2);
      break;
    }
    case 3: {
      const TensorView x = make({1, 40, 4, 8}), dt = make({1, 40, 4}), b = make({1, 40, 2, 16}),
                       c = make({1, 40, 2, 16}), a = make({4});
      ops::ssd_scan(face, x, dt, a, b, c, none, none, none, 16, 0);
      break;
    }
    default: {
      const TensorView x = make({21, 96}), w = make({50, 96});
      ops::linear(face, x, w, none);
    }
  }
  return std::move(face.results);
}

constexpr int kOps = 5;

bool same(const std::deque<Memory>& a, const std::deque<Memory>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
  return true;
}

}  // namespace

int main() {
  std::deque<Memory> expected[kOps];
  cpu::use_threads(1);
  for (int op = 0; op < kOps; ++op) expected[op] = call(op, 17u * op);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller)
    callers.emplace_back([&, caller] {
      for (int round = 0; round < 25; ++round)
        for (int op = 0; op < kOps; ++op) {
          cpu::use_threads(1 + (caller + round) % 5);
          if (!same(call((op + caller) % kOps, 17u * ((op + caller) % kOps)), expected[(op + caller) % kOps])) ++wrong;
        }
    });
  for (std::thread& caller : callers) caller.join();
  std::printf("%d of %d results differ from one thread's\n", wrong.load(), 4 * 25 * kOps);
  return wrong == 0 ? 0 : 1;
}
