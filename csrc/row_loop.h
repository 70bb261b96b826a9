// The loop that every vector instruction set shares: one pass over a row, a vector of pixels at a time.
//
// Included once by each guidance_stats_<isa>.cc, which is compiled with that instruction set's flags. Everything here
// is in an unnamed namespace and nothing from the standard library is instantiated: a function shared between files
// could be linked from the file with the newest instructions and crash an older processor.
//
// V, the vector traits of an instruction set:
//   Vec, width                      a vector of `width` float32
//   load(const T*), load(const T*, n)  widened to float32; the second reads only n < width values, the rest are 0
//   broadcast, add, sub, mul, fma (a * b + c), max
//   rsqrt(x)                        1 / sqrt(x) to float32's precision, for finite x >= 1e-32; anything for other x
//   sum(x)                          the sum over the lanes, in double
#pragma once

#include <type_traits>

#include "guidance_stats.h"

namespace memedge {
namespace {

constexpr std::size_t kVectorsPerFlush = 32;   // float32 sums longer than this would lose digits
constexpr std::size_t kChannelsPerGroup = 64;  // so would channels summed one after the other

// The processor's own prefetcher stops where a page ends, and a row's channels all reach the ends of theirs together:
// with these hints, large float32 batches are read about a sixth faster, halves a twentieth. For x86 only, where it was
// measured. The address is an integer, since a pointer may not leave its array; a hint is never a fault.
constexpr std::size_t kPixelsAhead = 256;

template <class T>
inline void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + kPixelsAhead * sizeof(T)));
}

template <class V>
struct PixelSums {
  typename V::Vec aa = V::broadcast(0), bb = V::broadcast(0), ab = V::broadcast(0), dd = V::broadcast(0);

  void add(const PixelSums& other) {
    aa = V::add(aa, other.aa);
    bb = V::add(bb, other.bb);
    ab = V::add(ab, other.ab);
    dd = V::add(dd, other.dd);
  }
};

// Latent diffusion's four channels as a constant: unrolled, each channel has its own load instruction, which the
// processor's prefetcher needs to see a stream.
struct Four {
  constexpr operator std::size_t() const { return 4; }
};

// `width` neighbouring pixels, or the `tail` last ones, summed over channels.
template <class V, Operands kOperands, class T, class Count, class... Tail>
inline PixelSums<V> channel_group(const T* cond, const T* uncond, Count channels, std::size_t pixels, Tail... tail) {
  PixelSums<V> s;
  for (std::size_t k = 0; k < channels; ++k) {
    const auto c = V::load(cond + k * pixels, tail...);
    const auto u = V::load(uncond + k * pixels, tail...);
    const auto delta = V::sub(c, u);
    const auto a = kOperands == Operands::uncond_delta ? u : c;
    const auto b = kOperands == Operands::cond_uncond ? u : delta;
    s.aa = V::fma(a, a, s.aa);
    s.bb = V::fma(b, b, s.bb);
    s.ab = V::fma(a, b, s.ab);
    s.dd = V::fma(delta, delta, s.dd);  // the compiler merges it with bb where b is delta
  }
  return s;
}

// Adds one vector of pixels to the row's running sums. A lane without a pixel is all zeros and adds nothing.
template <class V, Operands kOperands, class T, class Count, class... Tail>
inline void add_pixels(PixelSums<V>& row, typename V::Vec& cosine, const T* cond, const T* uncond, Count channels,
                       std::size_t pixels, Tail... tail) {
  PixelSums<V> s;
  if (channels <= kChannelsPerGroup) {
    s = channel_group<V, kOperands>(cond, uncond, channels, pixels, tail...);
  } else {
    for (std::size_t k = 0; k < channels; k += kChannelsPerGroup) {
      const std::size_t group = channels - k < kChannelsPerGroup ? channels - k : kChannelsPerGroup;
      s.add(channel_group<V, kOperands>(cond + k * pixels, uncond + k * pixels, group, pixels, tail...));
    }
  }
  const auto floor = V::broadcast(static_cast<float>(kMinSquaredNorm));
  const auto aa = V::max(s.aa, floor), bb = V::max(s.bb, floor);
  if constexpr (std::is_same_v<T, Half>) {
    cosine = V::fma(s.ab, V::rsqrt(V::mul(aa, bb)), cosine);
  } else {  // two reciprocals, since the product of two squared norms can leave float32's range; never that of halves
    cosine = V::fma(V::mul(s.ab, V::rsqrt(aa)), V::rsqrt(bb), cosine);
  }
  row.add(s);
}

template <class V, Operands kOperands, class T, class Count>
inline RowSums row_loop(const T* cond, const T* uncond, Count channels, std::size_t pixels) {
  RowSums row;
  const std::size_t whole = pixels - pixels % V::width;
  for (std::size_t p = 0; p < pixels;) {
    PixelSums<V> block;
    auto cosine = V::broadcast(0);
    const std::size_t left = whole - p;
    const std::size_t end = p + (left < kVectorsPerFlush * V::width ? left : kVectorsPerFlush * V::width);
    for (; p < end; p += V::width) {
      add_pixels<V, kOperands>(block, cosine, cond + p, uncond + p, channels, pixels);
    }
    if (p == whole && whole < pixels) {
      add_pixels<V, kOperands>(block, cosine, cond + p, uncond + p, channels, pixels, pixels - whole);
      p = pixels;
    }
    row.aa += V::sum(block.aa);
    row.bb += V::sum(block.bb);
    row.ab += V::sum(block.ab);
    row.dd += V::sum(block.dd);
    row.cosine += V::sum(cosine);
  }
  return row;
}

template <class V, class T, Operands kOperands>
RowSums row_sums(const void* cond_data, const void* uncond_data, std::size_t channels, std::size_t pixels) {
  const T* cond = static_cast<const T*>(cond_data);
  const T* uncond = static_cast<const T*>(uncond_data);
  if (channels == Four()) return row_loop<V, kOperands>(cond, uncond, Four(), pixels);
  return row_loop<V, kOperands>(cond, uncond, channels, pixels);
}

template <class V, class T>
RowKernel kernel_for(Operands operands) {
  switch (operands) {
    case Operands::cond_uncond:
      return row_sums<V, T, Operands::cond_uncond>;
    case Operands::cond_delta:
      return row_sums<V, T, Operands::cond_delta>;
    default:
      return row_sums<V, T, Operands::uncond_delta>;
  }
}

template <class V>
RowKernel kernel_for(DType dtype, Operands operands) {
  switch (dtype) {
    case DType::float16:
      return kernel_for<V, Half>(operands);
    case DType::bfloat16:
      return kernel_for<V, Bfloat16>(operands);
    default:
      return kernel_for<V, float>(operands);
  }
}

}  // namespace
}  // namespace memedge
