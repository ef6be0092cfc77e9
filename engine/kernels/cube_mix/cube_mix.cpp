// One axis mix of CubeMLP, forward and backward, in float or double (REAL).
//
// A cube [outer, d_in, inner] is cut into tiles of C columns: a column is one vector of length d_in along the mixed
// axis. Tiles are held as [feature][C], so that all arithmetic runs over columns and LayerNorm over features needs no
// horizontal sum. Where the mixed axis is the last one, tiles are transposed in registers as they are loaded and stored.
// All products of a tile are one routine, A (broadcast, any strides) times B (rows of columns), and everything between
// the load of a tile of x and the store of its tile of y stays in the core's own caches.
//
// Kept for the backward pass, per tile: the pre-activation, and with the norm at the end its normalised sum and the
// inverse deviation. Short axes keep nothing: their tiles are computed again, which costs less than the memory.
//
// Determinism. Tiles are cut into SLICES runs, whatever the number of threads; each run sums its weight gradients in
// order, and the runs are summed in order.

#include "vectors.h"

namespace {

constexpr int TALL = 6;         // rows of a tile of a product; WIDE vectors are its width
constexpr int64_t C = 64;       // columns of a tile; cpu.py knows it
constexpr int64_t SLICES = 16;  // runs of tiles
constexpr int64_t MARGIN = 16;  // rows that a transposition may read past the end

// -- elementwise --

// tanh: Cephes' tanhf; the polynomial keeps small arguments to full relative precision.
INLINE V hyperbolic_tangent(V x) {
  if constexpr (!SINGLE) return by_lane(x, [](T v) { return std::tanh(v); });
  const V s = x * x;
  V p = splat(T(-5.70498872745e-3));
  p = p * s + T(2.06390887954e-2);
  p = p * s - T(5.37397155531e-2);
  p = p * s + T(1.33314422036e-1);
  p = p * s - T(3.33332819422e-1);
  return s < T(0.390625) ? p * s * x + x : T(1) - T(2) / (exponential(x * T(2)) + T(1));
}
// Normal density and distribution. The tail is density times a polynomial in 1 / (1 + .26 |x|), fitted to Mills' ratio
// with relative error 2.5e-8: one exponential and one division serve both, and small tails keep their digits.
INLINE void normal(V x, V& density, V& distribution) {
  const V e = exponential(x * x * T(-0.5));
  density = e * T(0.39894228040143267794);
  if constexpr (!SINGLE) {
    distribution = by_lane(x, [](T v) { return T(0.5) * std::erfc(v * T(-0.70710678118654752440)); });
    return;
  }
  const V t = T(1) / (T(1) + (x < 0 ? -x : x) * T(0.26));
  V q = splat(T(0.030506398896113913));
  q = q * t - T(0.15283578212420315);
  q = q * t + T(0.25150482668969204);
  q = q * t - T(0.15096349289496774);
  q = q * t + T(0.16095724126411942);
  q = q * t + T(0.051023952756605796);
  q = q * t + T(0.10303114243547828);
  q = q * t + T(0.10301663444399309);
  q = q * t + T(0.10375906618856641);
  const V tail = q * t * e;
  distribution = x < 0 ? tail : T(1) - tail;
}

// In the order of ACTIVATIONS in op.py. value: f(x); slope: f'(x), as torch has it at the kinks.
struct Gelu {
  static INLINE void both(V x, V& value, V& slope) {
    V density, distribution;
    normal(x, density, distribution);
    value = x * distribution;
    slope = distribution + x * density;
  }
};
struct Relu {
  static INLINE void both(V x, V& value, V& slope) {
    value = x <= 0 ? splat(0) : x;  // NaN passes
    slope = x <= 0 ? splat(0) : splat(1);
  }
};
struct Tanh {
  static INLINE void both(V x, V& value, V& slope) {
    value = hyperbolic_tangent(x);
    slope = T(1) - value * value;
  }
};
struct LeakyRelu {
  static INLINE void both(V x, V& value, V& slope) {
    slope = x > 0 ? splat(1) : splat(T(0.01));
    value = x * slope;
  }
};
struct Elu {
  static INLINE void both(V x, V& value, V& slope) {
    const V e = exponential(x < 0 ? x : splat(0));
    value = x > 0 ? x : e - T(1);
    slope = x > 0 ? splat(1) : e;
  }
};
struct Hardtanh {
  static INLINE void both(V x, V& value, V& slope) {
    value = x < -1 ? splat(-1) : x > 1 ? splat(1) : x;
    slope = x <= -1 ? splat(0) : x >= 1 ? splat(0) : splat(1);
  }
};
struct Hardshrink {
  static INLINE void both(V x, V& value, V& slope) {
    slope = x > T(0.5) ? splat(1) : x < T(-0.5) ? splat(1) : splat(0);
    value = x > T(0.5) ? x : x < T(-0.5) ? x : splat(0);
  }
};

template <class F> void activate_as(const T* p, T* g, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    V value, slope;
    F::both(load(p + i), value, slope);
    store(g + i, value);
  }
}
// g = f(p), d = d f'(p)
template <class F> void differentiate_as(const T* p, T* g, T* d, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    V value, slope;
    F::both(load(p + i), value, slope);
    store(g + i, value);
    store(d + i, load(d + i) * slope);
  }
}
void (*const ACTIVATE[])(const T*, T*, int64_t) = {activate_as<Gelu>,      activate_as<Relu>, activate_as<Tanh>,
                                                   activate_as<LeakyRelu>, activate_as<Elu>,  activate_as<Hardtanh>,
                                                   activate_as<Hardshrink>};
void (*const DIFFERENTIATE[])(const T*, T*, T*, int64_t) = {
    differentiate_as<Gelu>, differentiate_as<Relu>,     differentiate_as<Tanh>,      differentiate_as<LeakyRelu>,
    differentiate_as<Elu>,  differentiate_as<Hardtanh>, differentiate_as<Hardshrink>};

// -- products --

template <int M, int N>
INLINE void product_tile(const T* a, int64_t ai, int64_t ak, const T* b, int64_t bk, int64_t K, const T* bias, T* c,
                         int64_t ci, bool add) {
  V sum[M][N];
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) sum[m][n] = splat(bias ? bias[m] : T(0));
  for (int64_t k = 0; k < K; k++, a += ak, b += bk) {
    V row[N];
    UNROLL for (int n = 0; n < N; n++) row[n] = load(b + n * W);
    UNROLL for (int m = 0; m < M; m++) {
      const V value = splat(a[m * ai]);
      UNROLL for (int n = 0; n < N; n++) sum[m][n] += value * row[n];
    }
  }
  UNROLL for (int m = 0; m < M; m++) UNROLL for (int n = 0; n < N; n++) {
    T* const to = c + m * ci + n * W;
    store(to, add ? load(to) + sum[m][n] : sum[m][n]);
  }
}
template <int M, int N, class... Rest> INLINE void with_height(int64_t height, Rest... rest) {
  if constexpr (M > 0) {
    if (height == M) product_tile<M, N>(rest...);
    else with_height<M - 1, N>(height, rest...);
  }
}
template <int N>
void product_panel(int64_t M, int64_t K, const T* a, int64_t ai, int64_t ak, const T* b, int64_t bk, const T* bias,
                   T* c, int64_t ci, bool add) {
  const int64_t tiles = (M + TALL - 1) / TALL;
  for (int64_t tile = 0, first = 0; tile < tiles; tile++) {
    const int64_t height = (M - first + tiles - tile - 1) / (tiles - tile);
    with_height<TALL, N>(height, a + first * ai, ai, ak, b, bk, K, bias ? bias + first : nullptr, c + first * ci, ci,
                         add);
    first += height;
  }
}
template <int N, class... Rest> INLINE void with_width(int64_t width, Rest... rest) {
  if constexpr (N > 0) {
    if (width == N) product_panel<N>(rest...);
    else with_width<N - 1>(width, rest...);
  }
}
// c [M, N] (+)= a [M, K] b [K, N] + bias [M]; N is padded to whole vectors.
void multiply(int64_t M, int64_t N, int64_t K, const T* a, int64_t ai, int64_t ak, const T* b, int64_t bk,
              const T* bias, T* c, int64_t ci, bool add) {
  for (int64_t n = 0; n < N; n += WIDE * W)
    with_width<WIDE>(std::min<int64_t>(WIDE, (N - n + W - 1) / W), M, K, a, ai, ak, b + n, bk, bias, c + n, ci, add);
}

// -- the mix --

struct Size { int64_t outer, inner, d_in, hidden, d_out, activation, ln_first, keep; };
struct Weights { const T *fc1, *bias1, *fc2, *bias2, *residual, *scale, *shift; };

// Weight gradients of a run of tiles. Matrices are kept transposed, those of short axes as they are but by lane;
// vectors by lane.
struct Sums {
  T *first, *second, *bias1, *bias2, *scale, *shift;
};

struct Mix {
  Size s;
  Weights w;
  T eps;
  int64_t H, O, I, N;             // hidden, d_out, d_in, length of the norm
  int64_t per_outer, tiles, at;   // `at`: the column where the residual's part of `first` begins
  int64_t first_width, second_width;
  bool small;      // weight gradients by inner products: the other way would be mostly padding
  Buffer stacked;  // [H + O][I]: fc1 over the residual

  Mix(const Size& s, const Weights& w, T eps)
      : s(s), w(w), eps(eps), H(s.hidden), O(s.d_out), I(s.d_in), N(s.ln_first ? I : O) {
    per_outer = (s.inner + C - 1) / C;
    tiles = s.inner > 1 ? s.outer * per_outer : (s.outer + C - 1) / C;
    at = s.ln_first ? round_up(H, W) : H;
    second_width = round_up(O, W);
    first_width = round_up(at + second_width, W);
    small = (H + O) * I + O * H <= 128;
    stacked = zeros((H + O) * I);
    std::copy_n(w.fc1, H * I, stacked.get());
    if (w.residual) std::copy_n(w.residual, O * I, stacked.get() + H * I);
  }

  int64_t kept() const { return s.keep ? C * (s.ln_first ? H : H + O + 1) : 0; }
  int64_t first_size() const { return small ? (H + O) * I * W : I * first_width; }
  int64_t second_size() const { return small ? O * H * W : H * second_width; }
  int64_t sums() const { return first_size() + second_size() + (H + O + 2 * N) * W; }
  Sums place(T* p) const {
    Sums r;
    r.first = p, p += first_size();
    r.second = p, p += second_size();
    r.bias1 = p, p += H * W;
    r.bias2 = p, p += O * W;
    r.scale = p, p += N * W;
    r.shift = p;
    return r;
  }

  void load_tile(int64_t tile, const T* from, int64_t d, T* to) const {
    if (s.inner == 1) {
      const int64_t first = tile * C, n = std::min(C, s.outer - first);
      if (n < C) std::fill_n(to, d * C, T(0));
      transpose(from + first * d, d, n, d, to, C, C);
      return;
    }
    const int64_t first = tile % per_outer * C, n = std::min(C, s.inner - first);
    from += tile / per_outer * d * s.inner + first;
    for (int64_t i = 0; i < d; i++)
      for (int64_t c = 0; c < C; c += W) store(to + i * C + c, load_some(from + i * s.inner + c, n - c));
  }
  void store_tile(int64_t tile, const T* from, int64_t d, T* to) const {
    if (s.inner == 1) {
      const int64_t first = tile * C, n = std::min(C, s.outer - first);
      transpose(from, C, d, n, to + first * d, d, d);
      return;
    }
    const int64_t first = tile % per_outer * C, n = std::min(C, s.inner - first);
    to += tile / per_outer * d * s.inner + first;
    for (int64_t i = 0; i < d; i++)
      for (int64_t c = 0; c < C; c += W) store_some(to + i * s.inner + c, load(from + i * C + c), n - c);
  }

  // x [d][C] -> normalised, inverse deviation [C], by column.
  void normalise(const T* x, int64_t d, T* normal, T* inverse) const {
    for (int64_t c = 0; c < C; c += W) {
      V mean{}, square{};
      for (int64_t i = 0; i < d; i++) mean += load(x + i * C + c);
      mean /= T(d);
      for (int64_t i = 0; i < d; i++) {
        const V v = load(x + i * C + c) - mean;
        square += v * v;
      }
      square = square / T(d) + eps;
      V r;
      for (int i = 0; i < W; i++) r[i] = T(1) / std::sqrt(square[i]);
      store(inverse + c, r);
      for (int64_t i = 0; i < d; i++) store(normal + i * C + c, (load(x + i * C + c) - mean) * r);
    }
  }
  void scale_and_shift(const T* normal, int64_t d, T* to) const {
    for (int64_t i = 0; i < d; i++) {
      const V scale = splat(w.scale[i]), shift = splat(w.shift[i]);
      for (int64_t c = 0; c < C; c += W) store(to + i * C + c, load(normal + i * C + c) * scale + shift);
    }
  }
  // d <- inverse (g - mean(g) - normal mean(g normal)), g = d scale, by column; sums of the scale's and shift's gradient.
  void normalise_backward(T* d, int64_t n, const T* normal, const T* inverse, const Sums& sums) const {
    for (int64_t i = 0; i < n; i++) {
      V scale = load(sums.scale + i * W), shift = load(sums.shift + i * W);
      for (int64_t c = 0; c < C; c += W) {
        scale += load(d + i * C + c) * load(normal + i * C + c);
        shift += load(d + i * C + c);
      }
      store(sums.scale + i * W, scale), store(sums.shift + i * W, shift);
    }
    for (int64_t c = 0; c < C; c += W) {
      V mean{}, along{};
      for (int64_t i = 0; i < n; i++) {
        // rounded by going through memory: left to a fused multiply-add, g - mean below would not cancel
        store(d + i * C + c, load(d + i * C + c) * w.scale[i]);
        const V g = load(d + i * C + c);
        mean += g;
        along += g * load(normal + i * C + c);
      }
      mean /= T(n), along /= T(n);
      const V r = load(inverse + c);
      for (int64_t i = 0; i < n; i++) {
        const V g = load(d + i * C + c);
        store(d + i * C + c, r * (g - mean - load(normal + i * C + c) * along));
      }
    }
  }
  static void sum_columns(const T* d, int64_t n, T* sums) {
    for (int64_t i = 0; i < n; i++) {
      V sum = load(sums + i * W);
      for (int64_t c = 0; c < C; c += W) sum += load(d + i * C + c);
      store(sums + i * W, sum);
    }
  }

  // What a thread works in.
  struct Space {
    Buffer memory;
    T *x, *u, *p, *g, *y, *normal, *inverse, *d, *columns, *dx;
    explicit Space(const Mix& m)
        : memory(zeros(C * (3 * m.I + 2 * m.H + m.O + m.N + 1 + m.H + m.O + MARGIN + m.first_width + MARGIN))) {
      T* q = memory.get();
      for (auto [to, rows] : {std::pair{&x, m.I}, {&u, m.I}, {&p, m.H}, {&g, m.H}, {&y, m.O}, {&normal, m.N},
                              {&inverse, int64_t(1)}, {&d, m.H + m.O + MARGIN}, {&columns, m.first_width + MARGIN},
                              {&dx, m.I}})
        *to = q, q += rows * C;
    }
  };

  // x -> u (the MLP's input), p, g, sum y; and normal, inverse: of x with ln_first, else of the sum.
  void forward_tile(Space& t, T* p, T* normal, T* inverse) const {
    const T* u = t.x;
    if (s.ln_first) {
      normalise(t.x, I, normal, inverse);
      scale_and_shift(normal, I, t.u);
      u = t.u;
    }
    multiply(H, C, I, w.fc1, I, 1, u, C, w.bias1, p, C, false);
    ACTIVATE[s.activation](p, t.g, H * C);
    multiply(O, C, H, w.fc2, H, 1, t.g, C, w.bias2, t.y, C, false);
    if (w.residual) multiply(O, C, I, w.residual, I, 1, t.x, C, nullptr, t.y, C, true);
    else for (int64_t i = 0; i < O * C; i += W) store(t.y + i, load(t.y + i) + load(t.x + i));
    if (!s.ln_first) normalise(t.y, O, normal, inverse);
  }

  void forward(const T* x, T* y, T* kept_all, int64_t tile, Space& t) const {
    load_tile(tile, x, I, t.x);
    T* const kept_here = s.keep ? kept_all + tile * kept() : nullptr;
    T* const p = s.keep ? kept_here : t.p;
    T* const normal = s.keep && !s.ln_first ? kept_here + H * C : t.normal;
    T* const inverse = s.keep && !s.ln_first ? kept_here + (H + O) * C : t.inverse;
    forward_tile(t, p, normal, inverse);
    if (!s.ln_first) scale_and_shift(normal, O, t.y);
    store_tile(tile, t.y, O, y);
  }

  void backward(const T* dy, const T* x, const T* kept_all, T* dx, int64_t tile, Space& t, const Sums& sums) const {
    load_tile(tile, x, I, t.x);
    const T *p = t.p, *normal = t.normal, *inverse = t.inverse;
    if (!s.keep) {
      forward_tile(t, t.p, t.normal, t.inverse);
    } else {
      p = kept_all + tile * kept();
      if (s.ln_first) {
        normalise(t.x, I, t.normal, t.inverse);
        scale_and_shift(t.normal, I, t.u);
      } else {
        normal = p + H * C, inverse = p + (H + O) * C;
      }
    }
    T *const dp = t.d, *const ds = t.d + H * C;
    load_tile(tile, dy, O, ds);
    if (!s.ln_first) normalise_backward(ds, O, normal, inverse, sums);
    multiply(H, C, O, w.fc2, 1, H, ds, C, nullptr, dp, C, false);
    DIFFERENTIATE[s.activation](p, t.g, dp, H * C);
    sum_columns(dp, H, sums.bias1);
    sum_columns(ds, O, sums.bias2);
    if (small) {
      inner_products(dp, H, s.ln_first ? t.u : t.x, I, sums.first);
      if (w.residual) inner_products(ds, O, t.x, I, sums.first + H * I * W);
      inner_products(ds, O, t.g, H, sums.second);
    } else {
      weight_gradients(t, sums);
    }
    if (s.ln_first || dx) {
      const bool both = !s.ln_first && w.residual;
      multiply(I, C, both ? H + O : H, stacked.get(), 1, I, dp, C, nullptr, t.dx, C, false);
      if (s.ln_first) {
        normalise_backward(t.dx, I, t.normal, t.inverse, sums);
        if (dx && w.residual) multiply(I, C, O, w.residual, 1, I, ds, C, nullptr, t.dx, C, true);
      }
      if (!w.residual) for (int64_t i = 0; i < I * C; i += W) store(t.dx + i, load(t.dx + i) + load(ds + i));
      if (dx) store_tile(tile, t.dx, I, dx);
    }
  }

  // sums[i][j] += a[i] . b[j] over columns, by lane.
  static void inner_products(const T* a, int64_t rows, const T* b, int64_t columns, T* sums) {
    for (int64_t i = 0; i < rows; i++, a += C)
      for (int64_t j = 0; j < columns; j++, sums += W) {
        V sum = load(sums);
        for (int64_t c = 0; c < C; c += W) sum += load(a + c) * load(b + j * C + c);
        store(sums, sum);
      }
  }

  void weight_gradients(Space& t, const Sums& sums) const {
    T* const ds = t.d + H * C;
    // [C][first_width]: columns as rows
    transpose(t.d, C, at == H ? H + O : H, C, t.columns, first_width, first_width);
    if (at != H) transpose(ds, C, O, C, t.columns + at, first_width, second_width);
    multiply(H, second_width, C, t.g, C, 1, t.columns + at, first_width, nullptr, sums.second, second_width, true);
    if (s.ln_first) {
      multiply(I, round_up(H, W), C, t.u, C, 1, t.columns, first_width, nullptr, sums.first, first_width, true);
      if (w.residual)
        multiply(I, second_width, C, t.x, C, 1, t.columns + at, first_width, nullptr, sums.first + at, first_width,
                 true);
    } else {
      const int64_t width = w.residual ? H + O : H;
      multiply(I, round_up(width, W), C, t.x, C, 1, t.columns, first_width, nullptr, sums.first, first_width, true);
    }
  }
};

T total(const T* by_slice, int64_t stride, int64_t lanes) {
  T sum = 0;
  for (int64_t slice = 0; slice < SLICES; slice++)
    for (int64_t i = 0; i < lanes; i++) sum += by_slice[slice * stride + i];
  return sum;
}

}  // namespace

extern "C" {

// size: outer, inner, d_in, hidden, d_out, activation, ln_first, keep. weights: fc1 [hidden, d_in], its bias, fc2
// [d_out, hidden], its bias, residual [d_out, d_in], norm's scale and shift; biases and residual may be null.
void cube_mix_forward(const int64_t* size, double eps, int threads, const void* const* weights, const T* x, T* y,
                      T* kept) {
  const Mix mix(*reinterpret_cast<const Size*>(size), *reinterpret_cast<const Weights*>(weights), T(eps));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Mix::Space space(mix);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < mix.tiles; tile++) mix.forward(x, y, kept, tile, space);
  }
}

// gradients: as weights, where null those are not wanted. dx may be null.
void cube_mix_backward(const int64_t* size, double eps, int threads, const void* const* weights, const T* dy,
                       const T* x, const T* kept, T* dx, T* const* gradients) {
  const Mix mix(*reinterpret_cast<const Size*>(size), *reinterpret_cast<const Weights*>(weights), T(eps));
  const int64_t stride = mix.sums(), H = mix.H, O = mix.O, I = mix.I;
  const Buffer memory = zeros(SLICES * stride);
  const Sums sums = mix.place(memory.get());
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Mix::Space space(mix);
#pragma omp for schedule(dynamic)
    for (int64_t slice = 0; slice < SLICES; slice++) {
      const Sums here = mix.place(memory.get() + slice * stride);
      for (int64_t tile = slice * mix.tiles / SLICES; tile < (slice + 1) * mix.tiles / SLICES; tile++)
        mix.backward(dy, x, kept, dx, tile, space, here);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < I; i++) {
      const int64_t lanes = mix.small ? W : 1;
      const auto at = [&](int64_t row, int64_t column) {
        return sums.first + (mix.small ? (row * I + i) * W : i * mix.first_width + column);
      };
      for (int64_t h = 0; h < H; h++) gradients[0][h * I + i] = total(at(h, h), stride, lanes);
      if (gradients[4])
        for (int64_t o = 0; o < O; o++) gradients[4][o * I + i] = total(at(H + o, mix.at + o), stride, lanes);
    }
#pragma omp for schedule(static)
    for (int64_t h = 0; h < H; h++)
      for (int64_t o = 0; o < O; o++)
        gradients[2][o * H + h] = mix.small ? total(sums.second + (o * H + h) * W, stride, W)
                                            : total(sums.second + h * mix.second_width + o, stride, 1);
  }
  const std::pair<const T*, int64_t> vectors[] = {
      {sums.bias1, H}, {sums.bias2, O}, {sums.scale, mix.N}, {sums.shift, mix.N}};
  T* const to[] = {gradients[1], gradients[3], gradients[5], gradients[6]};
  for (int v = 0; v < 4; v++)
    if (to[v])
      for (int64_t i = 0; i < vectors[v].second; i++) to[v][i] = total(vectors[v].first + i * W, stride, W);
}

}  // extern "C"
