// Dropout in float or double (REAL), and in bf16. Whether element i is kept is a function of (seed, i) alone, so that the backward
// pass computes the mask again, and no number of threads or processor changes the result.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// Mixes 32 bits: the constants are those that a search for the least bias found (Wellons' "lowbias32").
inline uint32_t mixed(uint32_t h) {
  h ^= h >> 16;
  h *= 0x7feb352du;
  h ^= h >> 15;
  h *= 0x846ca68bu;
  h ^= h >> 16;
  return h;
}

constexpr int64_t PIECE = int64_t(1) << 14;

// One element times a factor; bf16 is the upper half of a float, rounded to nearest, ties to even.
inline REAL scaled(REAL x, REAL factor) { return x * factor; }
inline uint16_t scaled(uint16_t x, float factor) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  value *= factor;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T, class F>
void apply(const T* x, T* y, int64_t n, uint64_t seed, uint32_t threshold, F factor, int threads) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && pieces > 8)
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t begin = p * PIECE;
    const int count = static_cast<int>(std::min(PIECE, n - begin));
    // pieces have keys of their own: 32 bits would not count the elements of a very large tensor
    const uint32_t key = mixed(low ^ mixed(high ^ mixed(static_cast<uint32_t>(p))));
    const T* from = x + begin;
    T* to = y + begin;
    for (int i = 0; i < count; i++) {
      const uint32_t draw = mixed(mixed(static_cast<uint32_t>(i) + key) ^ high);
      to[i] = draw >= threshold ? scaled(from[i], factor) : T(0);
    }
  }
}

}  // namespace

// y[i] = x[i] * scale where the draw of element i is at least `threshold`, else 0.
extern "C" void dropout(const REAL* x, REAL* y, int64_t n, uint64_t seed, uint32_t threshold, double scale,
                        int threads) {
  apply(x, y, n, seed, threshold, static_cast<REAL>(scale), threads);
}

// The same on bf16.
extern "C" void dropout_bf16(const uint16_t* x, uint16_t* y, int64_t n, uint64_t seed, uint32_t threshold,
                             double scale, int threads) {
  apply(x, y, n, seed, threshold, static_cast<float>(scale), threads);
}
