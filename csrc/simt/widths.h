// Which widths of a warpgroup's products there are, on the device and on the emulator.
#pragma once

namespace twotower::simt {

template <int N>
constexpr bool kIsProductWidth = N == 8 || N == 16 || (N >= 32 && N <= 256 && N % 32 == 0);

}  // namespace twotower::simt
