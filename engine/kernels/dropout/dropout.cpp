// Dropout in float or double (REAL). Whether element i is kept is a function of (seed, i) alone, so that the backward
// pass computes the mask again, and no number of threads or processor changes the result.

#include <algorithm>
#include <cstdint>

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

}  // namespace

// y[i] = x[i] * scale where the draw of element i is at least `threshold`, else 0.
extern "C" void dropout(const REAL* x, REAL* y, int64_t n, uint64_t seed, uint32_t threshold, double scale,
                        int threads) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const REAL factor = static_cast<REAL>(scale);
  const int64_t pieces = (n + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && pieces > 8)
  for (int64_t p = 0; p < pieces; p++) {
    const int64_t begin = p * PIECE;
    const int count = static_cast<int>(std::min(PIECE, n - begin));
    // pieces have keys of their own: 32 bits would not count the elements of a very large tensor
    const uint32_t key = mixed(low ^ mixed(high ^ mixed(static_cast<uint32_t>(p))));
    const REAL* from = x + begin;
    REAL* to = y + begin;
    for (int i = 0; i < count; i++) {
      const uint32_t draw = mixed(mixed(static_cast<uint32_t>(i) + key) ^ high);
      to[i] = draw >= threshold ? from[i] * factor : REAL(0);
    }
  }
}
