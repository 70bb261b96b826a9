// The CUDA kernel: one block per row, so that a row's result depends on nothing else and one launch does them all.
//
// Only the language is used, no runtime: a test runs this file unchanged on a CPU (tests/csrc/cuda_on_cpu.h).
//
// Sums are float32 in a fixed order, so equal input gives equal bits. A pixel's channels, a thread's pixels and the
// threads are summed as three levels, the middle one, which grows with the picture, with its rounding errors carried
// along. Consumer GPUs do float64 at a 64th of the speed: it is left to the last step, once per row. What differs from
// the CPU paths: a row's whole sum of squares has to fit in float32, else the row is not finite.
#pragma once

#include <math.h>
#include <string.h>

#include "block_sums.cuh"

namespace memedge {
namespace {

constexpr std::size_t kChannelsPerSum = 64;  // more channels summed one after the other would lose digits
constexpr int kSums = 5;                     // the five of RowSums

// Pixels that one 16-byte load brings.
template <class T>
constexpr unsigned kPixelsPerLoad = 16 / sizeof(T);

struct DeviceRows {
  const void* cond;
  const void* uncond;
  const std::int64_t* row;
  double* out;
  std::size_t channels, pixels;
  unsigned uncond_rows;
};

template <class T>
__device__ void load(const T* p, float (&x)[1]) {
  x[0] = to_float(*p);
}

template <class T>
__device__ void load(const T* p, float (&x)[kPixelsPerLoad<T>]) {
  const uint4 bytes = __ldg(reinterpret_cast<const uint4*>(p));
  T values[kPixelsPerLoad<T>];
  memcpy(values, &bytes, sizeof bytes);
#pragma unroll
  for (unsigned i = 0; i < kPixelsPerLoad<T>; ++i) x[i] = to_float(values[i]);
}

// kCount neighbouring pixels, each summed over channels.
template <unsigned kCount>
struct Pixels {
  float aa[kCount] = {}, bb[kCount] = {}, ab[kCount] = {}, dd[kCount] = {};
};

template <Operands kOperands, class T, unsigned kCount>
__device__ void add_channels(Pixels<kCount>& s, const T* cond, const T* uncond, std::size_t channels,
                             std::size_t pixels) {
#pragma unroll(kCount == 1 ? 4 : 2)  // more 16-byte loads at once would spill registers
  for (std::size_t k = 0; k < channels; ++k) {
    float c[kCount], u[kCount];
    load(cond + k * pixels, c);
    load(uncond + k * pixels, u);
#pragma unroll
    for (unsigned i = 0; i < kCount; ++i) {
      const float delta = c[i] - u[i];
      const float a = kOperands == Operands::uncond_delta ? u[i] : c[i];
      const float b = kOperands == Operands::cond_uncond ? u[i] : delta;
      s.aa[i] = fmaf(a, a, s.aa[i]);
      s.bb[i] = fmaf(b, b, s.bb[i]);
      s.ab[i] = fmaf(a, b, s.ab[i]);
      s.dd[i] = fmaf(delta, delta, s.dd[i]);  // the compiler merges it with bb where b is delta
    }
  }
}

template <unsigned kCount>
__device__ void add_pixels(Pixels<kCount>& s, const Pixels<kCount>& other) {
#pragma unroll
  for (unsigned i = 0; i < kCount; ++i) {
    s.aa[i] += other.aa[i];
    s.bb[i] += other.bb[i];
    s.ab[i] += other.ab[i];
    s.dd[i] += other.dd[i];
  }
}

// PyTorch's rule, as in serial.h; rounding never takes it out of [-1, 1].
__device__ inline double clamped_cosine(double aa, double bb, double ab) {
  return fmax(-1.0, fmin(1.0, ab / (sqrt(fmax(aa, kMinSquaredNorm)) * sqrt(fmax(bb, kMinSquaredNorm)))));
}

__device__ inline void store(const DeviceRows& rows, double norm, double channel, double flat) {
  double* out = rows.out + blockIdx.x;
  out[0] = norm;
  out[gridDim.x] = channel;
  out[std::size_t{2} * gridDim.x] = flat;
}

__device__ inline void store(const DeviceRows& rows, const float (&sums)[kSums]) {
  const double aa = sums[0], bb = sums[1], ab = sums[2], dd = sums[3], cosine = sums[4];
  if (isfinite(aa) && isfinite(bb) && isfinite(dd)) {
    store(rows, sqrt(dd), fmax(-1.0, fmin(1.0, cosine / static_cast<double>(rows.pixels))),
          clamped_cosine(aa, bb, ab));
  } else {
    store(rows, NAN, NAN, NAN);
  }
}

// Launched with one block of kThreads for each row. kCount is the pixels a thread loads at once: 1, or kPixelsPerLoad
// where every channel of every row starts at a multiple of 16 bytes and holds whole loads.
template <class T, Operands kOperands, unsigned kCount>
__global__ void __launch_bounds__(kThreads) guidance_stats_kernel(const DeviceRows rows) {
  const std::size_t channels = rows.channels, pixels = rows.pixels;
  const std::size_t row = rows.row ? static_cast<std::size_t>(rows.row[blockIdx.x]) : blockIdx.x % rows.uncond_rows;
  if (row >= rows.uncond_rows) {  // a negative index too; the host cannot look at what is in the GPU's memory
    if (threadIdx.x == 0) store(rows, NAN, NAN, NAN);
    return;
  }
  const T* cond = static_cast<const T*>(rows.cond) + blockIdx.x * (channels * pixels);
  const T* uncond = static_cast<const T*>(rows.uncond) + row * (channels * pixels);
  CarriedSum carried[kSums];

  for (std::size_t p = threadIdx.x * kCount; p < pixels; p += kThreads * kCount) {
    Pixels<kCount> s;
    if (channels <= kChannelsPerSum) {
      add_channels<kOperands>(s, cond + p, uncond + p, channels, pixels);
    } else {
      for (std::size_t k = 0; k < channels; k += kChannelsPerSum) {
        const std::size_t count = channels - k < kChannelsPerSum ? channels - k : kChannelsPerSum;
        Pixels<kCount> group;
        add_channels<kOperands>(group, cond + k * pixels + p, uncond + k * pixels + p, count, pixels);
        add_pixels(s, group);
      }
    }
    float total[kSums] = {};
#pragma unroll
    for (unsigned i = 0; i < kCount; ++i) {
      constexpr float kFloor = static_cast<float>(kMinSquaredNorm);
      total[0] += s.aa[i];
      total[1] += s.bb[i];
      total[2] += s.ab[i];
      total[3] += s.dd[i];
      // Two reciprocals, since the product of two squared norms can leave float32's range.
      total[4] = fmaf(s.ab[i] * rsqrtf(fmaxf(s.aa[i], kFloor)), rsqrtf(fmaxf(s.bb[i], kFloor)), total[4]);
    }
#pragma unroll
    for (int k = 0; k < kSums; ++k) carried[k].add(total[k]);
  }

  float sums[kSums];
  block_sums(carried, sums);
  if (threadIdx.x == 0) store(rows, sums);
}

}  // namespace
}  // namespace memedge
