// Calls ops that a file describes and writes their results to another: for processors that Python does not run on.
// `runner CALLS RESULTS`; tests/aarch64.py writes the one and reads the other.
//
// CALLS, in the processor's own byte order: for each call its op's name and its tensors, ints, floats and strings, each
// as a count (int64) and that many; a tensor is ndim (-1: absent), DType, shape, all int64, and its contiguous bytes.
// RESULTS: for each call the message of its error as a string (empty: none) and its results as tensors.
#include <algorithm>
#include <cstddef>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/ops/ops.h"

namespace {

using namespace twotower;

int64_t bytes_of(const TensorView& v) {
  return v.numel() * size_of(v.dtype);
}

struct Tensor {
  TensorView view;
  std::vector<std::max_align_t> memory;

  void allocate() {
    memory.resize(static_cast<size_t>(bytes_of(view)) / sizeof(std::max_align_t) + 1);
    view.data = memory.data();
    int64_t stride = 1;
    for (int i = view.ndim - 1; i >= 0; stride *= view.shape[i--]) view.strides[i] = stride;
  }
};

struct HostFace final : Face {
  std::map<int, Tensor> results;
  TensorView output(int slot, DType dtype, Device, std::initializer_list<int64_t> shape) override {
    Tensor& t = results[slot];
    t.view.dtype = dtype;
    t.view.ndim = static_cast<int>(shape.size());
    std::copy(shape.begin(), shape.end(), t.view.shape);
    t.allocate();
    return t.view;
  }
  void* workspace(int64_t) override { throw std::logic_error("CPU ops want no workspace"); }
};

struct Reader {
  std::ifstream file;
  explicit Reader(const char* path) : file(path, std::ios::binary) {
    if (!file) throw std::runtime_error(std::string("cannot read ") + path);
    file.exceptions(std::ios::badbit | std::ios::failbit);
  }
  bool at_end() { return file.peek() == std::ifstream::traits_type::eof(); }
  template <class T>
  T number() {
    T value;
    file.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::string text() {
    std::string value(static_cast<size_t>(number<int64_t>()), '\0');
    file.read(value.data(), static_cast<std::streamsize>(value.size()));
    return value;
  }
  Tensor tensor() {
    Tensor t;
    t.view.ndim = static_cast<int>(number<int64_t>());
    if (!t.view) return t;
    t.view.dtype = static_cast<DType>(number<int64_t>());
    for (int i = 0; i < t.view.ndim; ++i) t.view.shape[i] = number<int64_t>();
    t.allocate();
    file.read(static_cast<char*>(t.view.data), bytes_of(t.view));
    return t;
  }
  template <class Read>
  auto several(Read&& read) {
    std::vector<decltype(read())> all(static_cast<size_t>(number<int64_t>()));
    for (auto& one : all) one = read();
    return all;
  }
};

struct Arguments {
  std::vector<Tensor> tensors;
  std::vector<int64_t> n;
  std::vector<double> x;
  std::vector<std::string> s;
  const TensorView& t(size_t i) const { return tensors.at(i).view; }
};

// The arguments of each kind in the order of csrc/ops/ops.h.
void call(const std::string& op, Face& f, const Arguments& a) {
  const auto& [tensors, n, x, s] = a;
  const auto t = [&](size_t i) -> const TensorView& { return a.t(i); };
  if (op == "rms_norm") return ops::rms_norm(f, t(0), t(1), t(2), t(3), t(4), t(5), x.at(0), s.at(0));
  if (op == "gated_group_rms_norm") return ops::gated_group_rms_norm(f, t(0), t(1), t(2), n.at(0), x.at(0));
  if (op == "causal_conv1d") return ops::causal_conv1d(f, t(0), t(1), t(2), t(3), s.at(0));
  if (op == "ssd_scan") return ops::ssd_scan(f, t(0), t(1), t(2), t(3), t(4), t(5), t(6), t(7), n.at(0), n.at(1));
  if (op == "mamba_block")
    return ops::mamba_block(f, t(0), t(1), t(2), t(3), t(4), t(5), t(6), t(7), t(8), n.at(0), n.at(1), n.at(2), x.at(0),
                            n.at(3) != 0);
  if (op == "moe_route") return ops::moe_route(f, t(0), t(1), t(2), n.at(0), x.at(0));
  if (op == "moe_experts") return ops::moe_experts(f, t(0), t(1), t(2), t(3), t(4), t(5), t(6), s.at(0));
  if (op == "block_attention")
    return ops::block_attention(f, t(0), t(1), t(2), t(3), t(4), t(5), n.at(0) != 0, x.at(0));
  if (op == "two_stream_attention") return ops::two_stream_attention(f, t(0), t(1), t(2), t(3), t(4), n.at(0));
  const auto settings = [&] { return ops::CommitSettings{n.at(0), n.at(1), n.at(2), x.at(0), x.at(1), x.at(2)}; };
  if (op == "denoise_commit") return ops::denoise_commit(f, t(0), t(1), t(2), t(3), t(4), settings());
  if (op == "lm_head_commit") return ops::lm_head_commit(f, t(0), t(1), t(2), t(3), t(4), t(5), settings());
  throw std::logic_error("no op is called " + op);
}

void put(std::ofstream& to, int64_t value) {
  to.write(reinterpret_cast<const char*>(&value), sizeof value);
}

int run(const char* calls, const char* results) {
  Reader in(calls);
  std::ofstream out(results, std::ios::binary);
  int count = 0;
  for (; !in.at_end(); ++count) {
    const std::string op = in.text();
    const Arguments arguments{in.several([&] { return in.tensor(); }), in.several([&] { return in.number<int64_t>(); }),
                              in.several([&] { return in.number<double>(); }), in.several([&] { return in.text(); })};
    HostFace face;
    std::string error;
    try {
      call(op, face, arguments);
    } catch (const std::exception& e) {
      error = e.what();
      face.results.clear();
    }
    put(out, static_cast<int64_t>(error.size()));
    out << error;
    put(out, static_cast<int64_t>(face.results.size()));
    for (const auto& [slot, result] : face.results) {
      put(out, result.view.ndim);
      put(out, static_cast<int64_t>(result.view.dtype));
      for (int i = 0; i < result.view.ndim; ++i) put(out, result.view.shape[i]);
      out.write(static_cast<const char*>(result.view.data), bytes_of(result.view));
    }
  }
  return count > 0 && out.good() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    if (argc == 3) return run(argv[1], argv[2]);
    std::cerr << "usage: runner CALLS RESULTS\n";
  } catch (const std::exception& error) {
    std::cerr << "runner: " << error.what() << '\n';
  }
  return 2;
}
