// Padding of ragged sequences, and the scaling of their frames. REAL is float.
//
// Copying is bound by memory: every number of the result is written once, padding included.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

// A half's exponent and mantissa, moved in place, are its value times 2^-112; infinities and NaN keep a full exponent.
inline void convert(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const uint32_t h = from[i];
    uint32_t bits = (h & 0x8000u) << 16 | (h & 0x7fffu) << 13 | ((h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    to[i] = value * 0x1p112f;
  }
}
inline void convert(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
inline void convert(const int32_t* from, int64_t* to, int64_t n) { std::copy(from, from + n, to); }

template <class In, class Out>
void pad(const In* values, const int64_t* offsets, const int64_t* rows, int64_t batch, int64_t width, int64_t d,
         int64_t fill, int64_t closing, Out* out, int64_t* lengths, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t b = 0; b < batch; b++) {
    const int64_t start = offsets[rows[b]], whole = offsets[rows[b] + 1] - start, n = std::min(whole, width);
    Out* to = out + b * width * d;
    lengths[b] = n;
    convert(values + start * d, to, n * d);
    std::fill(to + n * d, to + width * d, Out(fill));
    if (closing >= 0 && n > 0 && n < whole) to[n - 1] = Out(closing);
  }
}

}  // namespace

extern "C" {

// kind: 0 float, 1 half, 2 int32.
void ragged_pad(int kind, const void* values, const int64_t* offsets, const int64_t* rows, int64_t batch, int64_t width,
                int64_t d, int64_t fill, int64_t closing, void* out, int64_t* lengths, int threads) {
  if (kind == 0)
    pad(static_cast<const float*>(values), offsets, rows, batch, width, d, fill, closing, static_cast<float*>(out),
        lengths, threads);
  else if (kind == 1)
    pad(static_cast<const uint16_t*>(values), offsets, rows, batch, width, d, fill, closing, static_cast<float*>(out),
        lengths, threads);
  else
    pad(static_cast<const int32_t*>(values), offsets, rows, batch, width, d, fill, closing, static_cast<int64_t*>(out),
        lengths, threads);
}

// out = (values - shift) * factor, cut to +-clip, in double; frames that are all zero stay so.
void ragged_scale(const float* values, int64_t frames, int64_t d, const double* shift, const double* factor,
                  double clip, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < frames; i++) {
    const float* v = values + i * d;
    float* to = out + i * d;
    bool present = false;
    for (int64_t c = 0; c < d; c++) present |= v[c] != 0;
    for (int64_t c = 0; c < d; c++)
      to[c] = present ? float(std::min(std::max((double(v[c]) - shift[c]) * factor[c], -clip), clip)) : 0.0f;
  }
}

}  // extern "C"
