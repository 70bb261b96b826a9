// AVX-512 (F, BW, VL): 16 pixels at a time, tails by mask.
#if defined(__x86_64__)  // a compilation for several architectures reads this file for each
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own intrinsics, gcc.gnu.org/PR105593
#endif
#include <immintrin.h>

#include "row_loop.h"

namespace memedge {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr std::size_t width = 16;

  static Vec load(const float* p) {
    prefetch(p);
    return _mm512_loadu_ps(p);
  }
  static Vec load(const Half* p) { return widen(p, bits(p)); }
  static Vec load(const Bfloat16* p) { return widen(p, bits(p)); }
  static Vec load(const float* p, std::size_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static Vec load(const Half* p, std::size_t n) { return widen(p, _mm256_maskz_loadu_epi16(mask(n), p)); }
  static Vec load(const Bfloat16* p, std::size_t n) { return widen(p, _mm256_maskz_loadu_epi16(mask(n), p)); }

  static Vec broadcast(float x) { return _mm512_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

  // The 14-bit estimate and one Newton step, y * (1.5 - 0.5 * x * y * y).
  static Vec rsqrt(Vec x) {
    const Vec y = _mm512_rsqrt14_ps(x);
    const Vec half_root = mul(mul(broadcast(0.5f), x), y);
    return mul(y, _mm512_fnmadd_ps(half_root, y, broadcast(1.5f)));
  }

  static double sum(Vec x) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }

 private:
  static __mmask16 mask(std::size_t n) { return static_cast<__mmask16>((1u << n) - 1); }
  template <class T>
  static __m256i bits(const T* p) {
    prefetch(p);
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Vec widen(const Half*, __m256i bits) { return _mm512_cvtph_ps(bits); }
  static Vec widen(const Bfloat16*, __m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace

RowKernel avx512_kernel(DType dtype, Operands operands) { return kernel_for<Avx512>(dtype, operands); }

}  // namespace memedge

#endif
