// Vectors of REAL (float or double), as wide as the processor's, and what the kernels build from them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace {

// WIDE vectors are the width of a product's tile; ACCUMULATORS of them fit the registers beside its operands.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, WIDE = 4, ACCUMULATORS = 24;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, WIDE = 2, ACCUMULATORS = 12;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, WIDE = 4, ACCUMULATORS = 24;
#else
constexpr int VECTOR_BYTES = 16, WIDE = 2, ACCUMULATORS = 12;
#endif

using T = REAL;
typedef T V __attribute__((vector_size(VECTOR_BYTES)));
constexpr int W = VECTOR_BYTES / sizeof(T);

INLINE V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof v); }
INLINE V splat(T x) { return x - V{}; }  // 0 - would lose the sign of -0, x - 0 keeps x

// The first n elements; the rest are 0.
INLINE V load_some(const T* p, int64_t n) {
  if (n >= W) return load(p);
  V v{};
  if (n > 0) std::memcpy(&v, p, n * sizeof(T));
  return v;
}
INLINE void store_some(T* p, V v, int64_t n) {
  if (n >= W) store(p, v);
  else if (n > 0) std::memcpy(p, &v, n * sizeof(T));
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Free { void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); } };
using Buffer = std::unique_ptr<T[], Free>;
inline Buffer buffer(int64_t n) {
  return Buffer(static_cast<T*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t(64))));
}
inline Buffer zeros(int64_t n) {
  Buffer b = buffer(n);
  std::fill_n(b.get(), n, T(0));
  return b;
}

constexpr bool SINGLE = std::is_same_v<T, float>;  // in double, the standard library's functions lane by lane
typedef std::conditional_t<SINGLE, int32_t, int64_t> Integer;
typedef Integer I __attribute__((vector_size(VECTOR_BYTES)));

template <class F> INLINE V by_lane(V x, F&& f) {
  for (int i = 0; i < W; i++) x[i] = f(x[i]);
  return x;
}

// exp: Cody-Waite reduction and a polynomial of degree 6 (Cephes' expf), within 2 ulp.
INLINE V exponential(V x) {
  if constexpr (!SINGLE) return by_lane(x, [](T v) { return std::exp(v); });
  x = x > 88 ? splat(88) : x;
  x = x < -87 ? splat(-87) : x;
  const V shift = splat(T(12582912.0));  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x * T(1.44269504088896341) + shift) - shift;
  const V r = (x - n * T(0.693359375)) + n * T(2.12194440e-4);
  V p = splat(T(1.9875691500e-4));
  p = p * r + T(1.3981999507e-3);
  p = p * r + T(8.3334519073e-3);
  p = p * r + T(4.1665795894e-2);
  p = p * r + T(1.6666665459e-1);
  p = p * r + T(5.0000001201e-1);
  p = p * (r * r) + r + T(1);
  return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

// -- transposition --

template <int D, size_t... J> INLINE void exchange(V& a, V& b, std::index_sequence<J...>) {
  const V low = __builtin_shufflevector(a, b, (int(J) & D ? int(J) - D + W : int(J))...);
  b = __builtin_shufflevector(a, b, (int(J) & D ? int(J) + W : int(J) + D)...);
  a = low;
}
template <int D> INLINE void butterfly(V (&v)[W]) {
  if constexpr (D > 0) {
    UNROLL for (int i = 0; i < W; i++)
      if (!(i & D)) exchange<D>(v[i], v[i + D], std::make_index_sequence<W>{});
    butterfly<D / 2>(v);
  }
}
// to[j][i] = from[i][j] for i < rows, j < columns; whole vectors of `to` are written up to `width`, zero past `rows`.
void transpose(const T* from, int64_t stride, int64_t rows, int64_t columns, T* to, int64_t to_stride, int64_t width) {
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t j = 0; j < columns; j += W) {
      V v[W];
      UNROLL for (int k = 0; k < W; k++) v[k] = i + k < rows ? load_some(from + (i + k) * stride + j, columns - j) : V{};
      butterfly<W / 2>(v);
      UNROLL for (int k = 0; k < W; k++)
        if (j + k < columns) store_some(to + (j + k) * to_stride + i, v[k], width - i);
    }
}

}  // namespace
