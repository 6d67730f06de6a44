// linear, stream_read: checks and launch.
#include "check.h"

namespace twotower::ops {

void linear(Face& face, View x, View weight, View bias) {
  Check check("linear", "x", x);
  Dim M{"rows"}, N{"outputs"}, K{"inputs"};
  check.floating(x, {&M, &K});
  check.like("weight", weight, {&N, &K});
  if (bias) check.like("bias", bias, {&N});

  const TensorView y = face.output(0, x.dtype, x.device, {M, N});
  if (y.numel() == 0) return;
  const LinearParams p{.dtype = x.dtype,
                       .M = M,
                       .N = N,
                       .K = K,
                       .x = rows<1>(x),
                       .weight = rows<1>(weight),
                       .bias = rows<0>(bias),
                       .y = rows<1>(y)};
  launch(check, face, p, cpu::kernels().linear, nullptr);
}

void stream_read(Face& face, View buffer) {
  Check check("stream_read", "buffer", buffer);
  Dim n{"values"};
  check.typed("buffer", buffer, DType::i64, {&n});
  check.contiguous("buffer", buffer);

  const TensorView sum = face.output(0, DType::i64, buffer.device, {1});
  const StreamReadParams p{
      .data = static_cast<const int64_t*>(buffer.data), .n = n, .sum = static_cast<int64_t*>(sum.data)};
  launch(check, face, p, cpu::kernels().stream_read, nullptr);
}

}  // namespace twotower::ops
