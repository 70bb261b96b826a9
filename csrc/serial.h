// The truth the fast paths are tested against, and the path of processors that have no fast one: one loop, in double.
#pragma once

#include <cmath>
#include <cstring>

#include "guidance_stats.h"

namespace memedge {

inline float widen(float x) { return x; }

inline float widen(Bfloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(Half x) {
  const std::uint32_t size = x.bits & 0x7fffu;  // without the sign: compilers make vectors of what has no branches
  const float small = static_cast<float>(static_cast<std::int32_t>(size)) * 0x1p-24f;  // below the least exponent
  const std::uint32_t bits = size < 0x7c00u ? (size << 13) + 0x38000000u : (size << 13) | 0x7f800000u;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value = size < 0x400u ? small : value;
  return x.bits & 0x8000u ? -value : value;
}

template <class T>
float element(const void* data, std::size_t index) {
  T value;  // copied, since the data need not be aligned
  std::memcpy(&value, static_cast<const char*>(data) + index * sizeof(T), sizeof(T));
  return widen(value);
}

// PyTorch's rule, on squared norms.
inline double cosine(double aa, double bb, double ab) {
  return ab / (std::sqrt(std::fmax(aa, kMinSquaredNorm)) * std::sqrt(std::fmax(bb, kMinSquaredNorm)));
}

template <class T, Operands kOperands>
RowSums serial_row(const void* cond, const void* uncond, std::size_t channels, std::size_t pixels) {
  RowSums row;
  for (std::size_t p = 0; p < pixels; ++p) {
    double aa = 0, bb = 0, ab = 0;
    for (std::size_t k = 0; k < channels; ++k) {
      const float c = element<T>(cond, k * pixels + p);
      const float u = element<T>(uncond, k * pixels + p);
      const float delta = c - u;
      const double a = kOperands == Operands::uncond_delta ? u : c;
      const double b = kOperands == Operands::cond_uncond ? u : delta;
      aa += a * a;
      bb += b * b;
      ab += a * b;
      row.dd += double{delta} * double{delta};
    }
    row.aa += aa;
    row.bb += bb;
    row.ab += ab;
    row.cosine += cosine(aa, bb, ab);
  }
  return row;
}

}  // namespace memedge
