// AVX2 with FMA and F16C: 8 pixels at a time.
#if defined(__x86_64__)  // a compilation for several architectures reads this file for each
#include <immintrin.h>

#include "row_loop.h"

namespace memedge {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr std::size_t width = 8;

  static Vec load(const float* p) {
    prefetch(p);
    return _mm256_loadu_ps(p);
  }
  static Vec load(const Half* p) { return _mm256_cvtph_ps(bits(p)); }
  static Vec load(const Bfloat16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits(p)), 16));
  }

  template <class T>
  static Vec load(const T* p, std::size_t n) {
    T padded[width] = {};
    __builtin_memcpy(padded, p, n * sizeof(T));
    return load(padded);
  }

  static Vec broadcast(float x) { return _mm256_set1_ps(x); }
  static Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

  // The 12-bit estimate and one Newton step, y * (1.5 - 0.5 * x * y * y).
  static Vec rsqrt(Vec x) {
    const Vec y = _mm256_rsqrt_ps(x);
    const Vec half_root = mul(mul(broadcast(0.5f), x), y);
    return mul(y, _mm256_fnmadd_ps(half_root, y, broadcast(1.5f)));
  }

  static double sum(Vec x) {
    const __m256d four =
        _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }

 private:
  template <class T>
  static __m128i bits(const T* p) {
    prefetch(p);
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
};

}  // namespace

RowKernel avx2_kernel(DType dtype, Operands operands) { return kernel_for<Avx2>(dtype, operands); }

}  // namespace memedge

#endif
