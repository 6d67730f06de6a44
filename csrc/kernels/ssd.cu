// ssd_scan and mamba_block: the choice of kernels, the workspace, the launches.
#include "launcher.h"
#include "ssd.cuh"

namespace twotower::cuda {
namespace {

constexpr int kChunkRows = 16;

bool fits_into_registers(int64_t N) {
  return N <= 128;
}

template <class Params>
kernels::ScanHeads heads_of(const Params& p, const Rows<3>& from, const Rows<3>& to) {
  return {.H = p.H,
          .P = p.P,
          .G = p.G,
          .N = p.N,
          .tiles = static_cast<uint32_t>((p.P + kernels::kScanColumns - 1) / kernels::kScanColumns),
          .A_log = p.A_log,
          .D = p.D,
          .dt_bias = p.dt_bias,
          .from = from,
          .to = to,
          .from_aligned = aligned<float>(from),
          .to_aligned = aligned<float>(to)};
}

template <class Source>
void launch_scan(const char* op, const char* argument, const Source& source, void* stream) {
  const auto& heads = source.heads;
  if (source.p.B > kMaxBlocks / heads.tiles / heads.H)
    throw std::invalid_argument(std::string(op) + ": " + argument +
                                " must have fewer than 2^31 tiles of 32 columns of a head, got more");
  // A single row has so little to multiply that columns which are not there cost nothing.
  auto* kernel = source.p.L == 1 ? kernels::scan_kernel<kernels::ScanTraits<Source, 1, 4>>
                 : heads.N <= 32 ? kernels::scan_kernel<kernels::ScanTraits<Source, kChunkRows, 1>>
                 : heads.N <= 64 ? kernels::scan_kernel<kernels::ScanTraits<Source, kChunkRows, 2>>
                                 : kernels::scan_kernel<kernels::ScanTraits<Source, kChunkRows, 4>>;
  simt::launch(op, kernel, source.p.B * heads.H * heads.tiles, kernels::kScanThreads, 0, stream, source);
}

// The workspace of mamba_block: y in float32, and where no new state is asked for but passes through memory, that.
int64_t y_elements(const MambaBlockParams& p) {
  return p.B * p.L * p.H * p.P;
}
bool needs_room_for_state(const MambaBlockParams& p) {
  return !p.new_ssm_state && p.L > kChunkRows && !fits_into_registers(p.N);
}

}  // namespace

void ssd_scan(const ScanParams& p, void* stream) {
  constexpr const char* kOp = "ssd_scan";
  require_supported_device(kOp);
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) {
    launch_scan(kOp, "x",
                kernels::ScanSource<T>{heads_of(p, p.initial_state, p.final_state), p, aligned<float>(p.states)},
                stream);
  });
}

int64_t mamba_block_workspace(const MambaBlockParams& p) {
  const int64_t state = needs_room_for_state(p) ? p.B * p.H * p.P * p.N : 0;
  return (y_elements(p) + state) * static_cast<int64_t>(sizeof(float));
}

void mamba_block(const MambaBlockParams& p, void* stream) {
  constexpr const char* kOp = "mamba_block";
  require_supported_device(kOp);
  float* y = static_cast<float*>(p.workspace);
  Rows<3> state = p.new_ssm_state;
  if (needs_room_for_state(p)) state = {y + y_elements(p), {p.H * p.P * p.N, p.P * p.N, p.N}};
  for_dtype(kOp, p.dtype, [&]<class T>(std::type_identity<T>) {
    launch_scan(kOp, "zxbcdt", kernels::BlockSource<T>{heads_of(p, p.ssm_state, state), p, y}, stream);
  });
  gated_norm_of_block({.dtype = p.dtype,
                       .eps = p.eps,
                       .B = p.B,
                       .L = p.L,
                       .D = p.H * p.P,
                       .group_size = p.H / p.G * p.P,
                       .y = {y, {p.L * p.H * p.P, p.H * p.P}},
                       .z = p.zxbcdt,
                       .weight = p.norm_weight,
                       .out = p.out},
                      stream);
}

}  // namespace twotower::cuda
