// NEON (every AArch64 processor has it): 4 pixels at a time.
#if defined(__aarch64__)  // a compilation for several architectures reads this file for each
#include <arm_neon.h>

#include "row_loop.h"

namespace memedge {
namespace {

struct Neon {
  using Vec = float32x4_t;
  static constexpr std::size_t width = 4;

  // Loaded as bytes, since the data need not be aligned.
  static Vec load(const float* p) { return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(p))); }
  static Vec load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u8(bits(p))); }
  static Vec load(const Bfloat16* p) { return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(bits(p)), 16)); }

  template <class T>
  static Vec load(const T* p, std::size_t n) {
    T padded[width] = {};
    __builtin_memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }

  static Vec broadcast(float x) { return vdupq_n_f32(x); }
  static Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
  static Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
  static Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
  static Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }

  // The 8-bit estimate and two Newton steps.
  static Vec rsqrt(Vec x) {
    Vec y = vrsqrteq_f32(x);
    y = mul(y, vrsqrtsq_f32(mul(x, y), y));
    return mul(y, vrsqrtsq_f32(mul(x, y), y));
  }

  static double sum(Vec x) {
    return vaddvq_f64(vaddq_f64(vcvt_f64_f32(vget_low_f32(x)), vcvt_high_f64_f32(x)));
  }

 private:
  static uint8x8_t bits(const void* p) { return vld1_u8(static_cast<const std::uint8_t*>(p)); }
};

}  // namespace

RowKernel neon_kernel(DType dtype, Operands operands) { return kernel_for<Neon>(dtype, operands); }

}  // namespace memedge

#endif
