// Matrix products of small operands that lie in the caches: sums in registers, no packing.

#pragma once

#include "vectors.h"

namespace {

constexpr int64_t PANEL = WIDE * W;

INLINE T total(V v) { T s = 0; UNROLL for (int i = 0; i < W; i++) s += v[i]; return s; }
INLINE T largest(V v) { T s = v[0]; UNROLL for (int i = 1; i < W; i++) s = std::max(s, v[i]); return s; }

// A part of a product's inner dimension: a[m][k] b[k][n], k < depth; `row` is the distance of rows of a.
struct Part { const T* a; int64_t row; const T* b; int64_t depth; };

// M rows and NV vectors of columns of the sum of products over parts; b's rows are `ldb` apart. With TRANSPOSED, a is
// read as a[k][m], its rows k `row` apart. finish(at, m, v, sum) takes each vector, `at` in `to`, rows `ld` apart.
template <int M, int NV, bool TRANSPOSED, class F>
INLINE void tile(const Part* parts, int count, int64_t first, int64_t ldb, T* to, int64_t ld, F&& finish) {
  V sum[M][NV];
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int v = 0; v < NV; v++) {
      sum[m][v] = V{};
      __builtin_prefetch(to + (first + m) * ld + v * W, 1);
    }
  }
  for (int p = 0; p < count; p++) {
    const Part part = parts[p];
    const T* a = part.a + (TRANSPOSED ? first : first * part.row);
    const T* b = part.b;
    for (int64_t k = 0; k < part.depth; k++, b += ldb) {
      V right[NV];
      UNROLL for (int v = 0; v < NV; v++) right[v] = load(b + v * W);
      // what the next tile reads: the processor's own prefetching does not foresee the jump
      if (TRANSPOSED) {
        __builtin_prefetch(a + k * part.row + 2 * M);
      } else if (k % W == 0) {
        UNROLL for (int m = 0; m < M; m++) __builtin_prefetch(a + (m + M) * part.row + k);
      }
      UNROLL for (int m = 0; m < M; m++) {
        const V left = splat(TRANSPOSED ? a[k * part.row + m] : a[m * part.row + k]);
        UNROLL for (int v = 0; v < NV; v++) sum[m][v] += left * right[v];
      }
    }
  }
  UNROLL for (int m = 0; m < M; m++) {
    UNROLL for (int v = 0; v < NV; v++) finish(to + (first + m) * ld + v * W, first + m, v, sum[m][v]);
  }
}

template <int MOST, class F> INLINE void with_size(int n, F&& f) {
  if constexpr (MOST > 0) {
    if (n == MOST) f(std::integral_constant<int, MOST>{});
    else with_size<MOST - 1>(n, f);
  }
}

constexpr int tallest(int vectors) { return vectors == 1 ? ACCUMULATORS / 2 : ACCUMULATORS / vectors; }

// All rows of a product with `vectors` <= WIDE vectors of columns.
template <bool TRANSPOSED, class F>
void product(const Part* parts, int count, int64_t rows, int64_t vectors, int64_t ldb, T* to, int64_t ld, F&& finish) {
  with_size<WIDE>(int(vectors), [&](auto nv) {
    constexpr int MOST = tallest(nv);
    const int64_t tiles = (rows + MOST - 1) / MOST;
    for (int64_t t = 0, first = 0; t < tiles; t++) {
      const int height = int((rows - first + tiles - t - 1) / (tiles - t));
      with_size<MOST>(height, [&](auto m) { tile<m, nv, TRANSPOSED>(parts, count, first, ldb, to, ld, finish); });
      first += height;
    }
  });
}

}  // namespace
