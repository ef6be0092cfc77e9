// Padding of ragged sequences, and the scaling of their frames. REAL is float.
//
// Copying is bound by memory: every number of the result is written once, padding included.

#include "vectors.h"

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
// Whole vectors: a library's copy of this size, tuned for both sides in the caches, takes a tenth longer. What is read is
// fetched 4 KiB ahead and passes the larger caches by, which hold the batch's memory from one batch to the next.
inline void convert(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    __builtin_prefetch(from + i + 1024, 0, 0);
    store(to + i, load(from + i));
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(float));
}
inline void convert(const int32_t* from, int64_t* to, int64_t n) { std::copy(from, from + n, to); }

inline void fill(float* to, int64_t n, int64_t value) {
  if (value == 0) std::memset(to, 0, n * sizeof(float));
  else std::fill(to, to + n, float(value));
}
inline void fill(int64_t* to, int64_t n, int64_t value) { std::fill(to, to + n, value); }

// (v - shift) * factor of one frame, cut to +-clip, in double; a frame that is all zero stays so. May be in place.
inline void scale(const float* v, float* to, int64_t d, const double* shift, const double* factor, double clip) {
  bool present = false;
  for (int64_t c = 0; c < d; c++) present |= v[c] != 0;
  for (int64_t c = 0; c < d; c++)
    to[c] = present ? float(std::min(std::max((double(v[c]) - shift[c]) * factor[c], -clip), clip)) : 0.0f;
}

// Sequences end to end and how they are padded; without values: ones where a sequence has something.
// kind: 0 float, 1 half, 2 int32. most: longer sequences are cut to it. shift, factor, clip: see `scale`; null: as it is.
struct Source {
  int64_t kind;
  const void* values;
  const int64_t* offsets;
  int64_t d, fill, closing, most;
  const double *shift, *factor;
  double clip;
};

inline void scaled(const float* from, float* to, int64_t n, const Source& s) {
  for (int64_t i = 0; i < n; i++) scale(from + i * s.d, to + i * s.d, s.d, s.shift, s.factor, s.clip);
}
inline void scaled(const uint16_t* from, float* to, int64_t n, const Source& s) {
  convert(from, to, n * s.d);
  scaled(to, to, n, s);
}
inline void scaled(const int32_t*, int64_t*, int64_t, const Source&) {}  // numbers are not scaled

template <class In, class Out>
void pad(const Source& s, int64_t start, int64_t whole, int64_t n, int64_t width, Out* to) {
  const In* values = static_cast<const In*>(s.values) + start * s.d;
  if (s.shift) scaled(values, to, n, s);
  else convert(values, to, n * s.d);
  fill(to + n * s.d, (width - n) * s.d, s.fill);
  if (s.closing >= 0 && n > 0 && n < whole) to[n - 1] = Out(s.closing);
}

// Sequence b of a batch; returns its length.
int64_t pad(const Source& s, int64_t row, int64_t b, int64_t width, void* out) {
  const int64_t d = s.d, start = s.offsets[row], whole = s.offsets[row + 1] - start;
  const int64_t n = std::min(whole, std::min(width, s.most)), at = b * width * d;
  float* const real = static_cast<float*>(out) + at;
  int64_t* const integer = static_cast<int64_t*>(out) + at;
  if (!s.values) {
    fill(integer, n, 1);
    fill(integer + n, width - n, 0);
  } else if (s.kind == 0) {
    pad<float>(s, start, whole, n, width, real);
  } else if (s.kind == 1) {
    pad<uint16_t>(s, start, whole, n, width, real);
  } else {
    pad<int32_t>(s, start, whole, n, width, integer);
  }
  return n;
}

// Up to so many numbers a second thread saves a few microseconds at most. Once woken it waits busily for more, which takes a
// core from whoever makes the rest of a batch: DALI's threads, say.
constexpr int64_t ALONE = 1 << 16;

}  // namespace

extern "C" {

// Sequences `rows` of every source into out[source], [size][width][d]. lengths: of the last source, or null.
void ragged_pad(int64_t count, const Source* sources, int64_t size, const int64_t* rows, const int64_t* widths,
                void* const* out, int64_t* lengths, int threads) {
  int64_t numbers = 0;
  for (int64_t i = 0; i < count; i++) numbers += size * widths[i] * sources[i].d;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && numbers > ALONE)
  for (int64_t b = 0; b < size; b++) {
    int64_t n = 0;
    for (int64_t i = 0; i < count; i++) n = pad(sources[i], rows[b], b, widths[i], out[i]);
    if (lengths) lengths[b] = n;
  }
}

// `scale` of every frame of values.
void ragged_scale(const float* values, int64_t frames, int64_t d, const double* shift, const double* factor,
                  double clip, float* out, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < frames; i++) scale(values + i * d, out + i * d, d, shift, factor, clip);
}

}  // extern "C"
