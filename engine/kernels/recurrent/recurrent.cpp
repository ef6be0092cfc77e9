// Bidirectional multi-layer GRU and LSTM over a ragged batch: forward and backward, in float or double (REAL).
//
// Layout. Rows are sorted by length, longest first, and cut into groups of GROUP rows. A group is stored time-major
// without padding ("packed", as torch's PackedSequence): step t holds its active[t] longest rows. All groups follow one
// another on one axis of N = sum(length) tokens. Hidden units are cut into panels of W units (one vector register), and
// the gates of a panel lie side by side: gates[panel][token][slot][W]. One tile of the small product h W_hh^T then
// holds all gates of its units in registers, so the gate functions follow at once and nothing is stored in between.
//
// Forward of a layer: the input projection of all tokens, then one sequential loop per (group, direction). Backward:
// the loops reversed leave the gate gradients of all tokens, then input and weight gradients are products over them.
//
// Determinism. Every sum runs in one fixed order: over k for a product, over tokens for a weight gradient. Tile heights
// and the number of threads change which rows are worked on together, never the order within a sum: a row's result
// depends on nothing but that row, and no result depends on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, REGISTERS = 32;
#else
constexpr int VECTOR_BYTES = 16, REGISTERS = 16;
#endif

constexpr int WIDE = REGISTERS == 32 ? 4 : 2;      // vectors in a column panel of the backward products
constexpr int TALL = 6;                            // rows of a tile there
constexpr int64_t GROUP = 32;                      // rows of a group: all its hidden states stay in the first cache
constexpr int64_t CHUNK = 96;                      // tokens of a task of the input projection and of the input gradient
constexpr int64_t BLOCK = 64;                      // tokens of a block of the weight gradients
constexpr int64_t SHARE = 4;                       // panels of a task of the weight gradients

template <class T> struct Vector {
  typedef T type __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr int W = VECTOR_BYTES / sizeof(T);
};
template <class T> using V = typename Vector<T>::type;

template <class T> INLINE V<T> load(const T* p) { V<T> v; std::memcpy(&v, p, sizeof v); return v; }
template <class T> INLINE void store(T* p, V<T> v) { std::memcpy(p, &v, sizeof v); }
template <class T> INLINE V<T> splat(T x) { return x - V<T>{}; }  // 0 - would lose the sign of -0, x - 0 keeps x

// The first n elements; the rest are 0.
template <class T> INLINE V<T> load_some(const T* p, int64_t n) {
  if (n >= Vector<T>::W) return load(p);
  V<T> v{};
  std::memcpy(&v, p, n * sizeof(T));
  return v;
}
template <class T> INLINE void store_some(T* p, V<T> v, int64_t n) {
  if (n >= Vector<T>::W) store(p, v); else std::memcpy(p, &v, n * sizeof(T));
}

// exp: Cody-Waite reduction and a polynomial of degree 6 (Cephes' expf), within 2 ulp.
INLINE V<float> exponential(V<float> x) {
  typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
  x = x > 88.0f ? splat(88.0f) : x;
  x = x < -87.0f ? splat(-87.0f) : x;
  const V<float> shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V<float> n = (x * 1.44269504088896341f + shift) - shift;
  const V<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V<float> p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const I bits = (__builtin_convertvector(n, I) + 127) << 23;
  return p * (V<float>)bits;
}
INLINE V<double> exponential(V<double> x) {
  for (int i = 0; i < Vector<double>::W; i++) x[i] = std::exp(x[i]);
  return x;
}

template <class T> INLINE V<T> sigmoid(V<T> x) { return T(1) / (T(1) + exponential(-x)); }

// tanh: Cephes' tanhf; the polynomial keeps small arguments to full relative precision.
INLINE V<float> hyperbolic_tangent(V<float> x) {
  const V<float> s = x * x;
  V<float> p = splat(-5.70498872745e-3f);
  p = p * s + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const V<float> small = p * s * x + x;
  const V<float> large = 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f);
  return (s < 0.390625f) ? small : large;
}
INLINE V<double> hyperbolic_tangent(V<double> x) {
  for (int i = 0; i < Vector<double>::W; i++) x[i] = std::tanh(x[i]);
  return x;
}

template <int MOST, class F> INLINE void with_height(int height, F&& f) {
  if constexpr (MOST > 0) {
    if (height == MOST) f(std::integral_constant<int, MOST>{});
    else with_height<MOST - 1>(height, f);
  }
}

// f(first, height) over n rows in tiles of at most MOST rows and nearly equal height.
template <int MOST, class F> INLINE void in_tiles(int64_t n, F&& f) {
  const int64_t tiles = (n + MOST - 1) / MOST;
  for (int64_t tile = 0, first = 0; tile < tiles; tile++) {
    const int height = int((n - first + tiles - tile - 1) / (tiles - tile));
    with_height<MOST>(height, [&](auto m) { f(first, m); });
    first += height;
  }
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T> struct Free { void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); } };
template <class T> using Buffer = std::unique_ptr<T[], Free<T>>;
template <class T> Buffer<T> buffer(int64_t n) {
  return Buffer<T>(static_cast<T*>(::operator new[](std::max<int64_t>(n, 1) * sizeof(T), std::align_val_t(64))));
}
template <class T> Buffer<T> zeros(int64_t n) {
  auto b = buffer<T>(n);
  std::fill_n(b.get(), n, T(0));
  return b;
}

// The packed layout of a batch.
struct Group {
  int64_t base, steps;               // its first token, its longest length
  std::vector<int64_t> active, at;   // rows and first token of each step
};
struct Layout {
  int64_t tokens = 0;
  std::vector<Group> groups;
  std::vector<int64_t> place;            // row of the padded [B * L, .] tensors of each token
  std::vector<int64_t> previous[2];      // the token before each token, by direction; -1 at a sequence's start

  Layout(int64_t batch, int64_t width, const int64_t* length) {
    std::vector<int64_t> order(batch);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length[a] > length[b]; });
    for (int64_t first = 0; first < batch; first += GROUP) {
      Group group{tokens, length[order[first]], {}, {}};
      int64_t rows = std::min(GROUP, batch - first);
      for (int64_t t = 0; t < group.steps; t++) {
        while (length[order[first + rows - 1]] <= t) rows--;
        group.active.push_back(rows);
        group.at.push_back(tokens);
        for (int64_t i = 0; i < rows; i++) place.push_back(order[first + i] * width + t);
        tokens += rows;
      }
      for (int64_t t = 0; t < group.steps; t++) {
        const int64_t next = t + 1 < group.steps ? group.active[t + 1] : 0;
        for (int64_t i = 0; i < group.active[t]; i++) {
          previous[0].push_back(t ? group.at[t - 1] + i : -1);
          previous[1].push_back(i < next ? group.at[t + 1] + i : -1);
        }
      }
      groups.push_back(std::move(group));
    }
  }
};

// Rows of a tensor by token: packed, or scattered over a padded tensor.
template <class T> struct Rows {
  T* data;
  int64_t stride;
  const int64_t* place;  // null: packed
  INLINE T* operator[](int64_t token) const { return data + (place ? place[token] : token) * stride; }
};

// Gates of a cell. SLOTS values are kept per unit and token; input_slot and hidden_slot name the slot that holds the
// gradient of gate g as it enters through W_ih and through W_hh: they differ for the GRU's candidate alone, whose
// hidden part is multiplied by the reset gate.
struct Gru {
  static constexpr int GATES = 3, SLOTS = 4;  // kept: r, z, n, W_hn h + b_hn; gradients: dr, dz, dn, r dn
  static constexpr int TILE = REGISTERS == 32 ? 8 : 4;
  static constexpr bool joined_bias(int gate) { return gate < 2; }
  static constexpr int input_slot(int gate) { return gate; }
  static constexpr int hidden_slot(int gate) { return gate < 2 ? gate : 3; }
};
struct Lstm {
  static constexpr int GATES = 4, SLOTS = 5;  // kept: i, f, g, o, c; gradients: di, df, dg, do
  static constexpr int TILE = REGISTERS == 32 ? 6 : 2;
  static constexpr bool joined_bias(int) { return true; }
  static constexpr int input_slot(int gate) { return gate; }
  static constexpr int hidden_slot(int gate) { return gate; }
};
constexpr int GRADIENTS = 4;  // slots of a gradient, for both cells

template <class T, class C> struct Network {
  static constexpr int W = Vector<T>::W, G = C::GATES, S = C::SLOTS;
  static constexpr int64_t COLUMNS = WIDE * W;

  struct Weights { const T *input, *hidden, *input_bias, *hidden_bias; };
  struct Gradients { T *input, *hidden, *input_bias, *hidden_bias; };

  int layers;
  int64_t batch, width, features, hidden;
  const int64_t* length;
  const T* x;
  const Weights* weights;  // [layers][2]
  T *out, *state;
  int threads;
  Layout layout;
  int64_t N, P, padded;  // tokens, panels, hidden units with padding

  Network(int layers, int64_t batch, int64_t width, int64_t features, int64_t hidden, const int64_t* length, const T* x,
          const void* weights, T* out, T* state, int threads)
      : layers(layers), batch(batch), width(width), features(features), hidden(hidden), length(length), x(x),
        weights(static_cast<const Weights*>(weights)), out(out), state(state), threads(threads),
        layout(batch, width, length), N(layout.tokens), P((hidden + W - 1) / W), padded(round_up(hidden, COLUMNS)) {}

  int64_t inputs(int layer) const { return layer ? 2 * hidden : features; }
  T* gates(int layer, int direction) const { return state + (2 * layer + direction) * P * N * S * W; }
  // Hidden states of a layer, both directions; the last layer's are the output itself.
  Rows<T> states(int layer) const {
    if (layer == layers - 1) return {out, 2 * hidden, layout.place.data()};
    return {state + 2 * layers * P * N * S * W + layer * N * 2 * hidden, 2 * hidden, nullptr};
  }
  Rows<const T> input(int layer) const {
    if (!layer) return {x, features, layout.place.data()};
    const Rows<T> below = states(layer - 1);
    return {below.data, below.stride, below.place};
  }
  INLINE int64_t units(int64_t panel) const { return std::min<int64_t>(W, hidden - panel * W); }

  // -- forward --

  // [G * hidden, K] -> [P][K][G][W], so that a tile reads it in order.
  void pack_forward(T* to, const T* from, int64_t K, int64_t p) const {
    to += p * K * G * W;
    for (int64_t k = 0; k < K; k++)
      for (int g = 0; g < G; g++)
        for (int64_t w = 0; w < W; w++) *to++ = w < units(p) ? from[(g * hidden + p * W + w) * K + k] : T(0);
  }

  template <int M> static INLINE void multiply(V<T> (&sum)[M][G], const T* const (&a)[M], const T* b, int64_t K) {
    for (int64_t k = 0; k < K; k++, b += G * W) {
      V<T> column[G];
      UNROLL for (int g = 0; g < G; g++) column[g] = load(b + g * W);
      UNROLL for (int m = 0; m < M; m++) {
        const V<T> value = splat(a[m][k]);
        UNROLL for (int g = 0; g < G; g++) sum[m][g] += value * column[g];
      }
    }
  }

  void project(int layer, int direction, const T* packed, int64_t first, int64_t last) const {
    const Weights& w = weights[2 * layer + direction];
    const Rows<const T> rows = input(layer);
    const int64_t K = inputs(layer);
    T* const to = gates(layer, direction);
    for (int64_t p = 0; p < P; p++) {
      V<T> bias[G];
      for (int g = 0; g < G; g++) {
        bias[g] = load_some(w.input_bias + g * hidden + p * W, units(p));
        if (C::joined_bias(g)) bias[g] += load_some(w.hidden_bias + g * hidden + p * W, units(p));
      }
      in_tiles<C::TILE>(last - first, [&](int64_t i, auto height) INLINE_LAMBDA {
        constexpr int M = decltype(height)::value;
        const T* a[M];
        V<T> sum[M][G];
        UNROLL for (int m = 0; m < M; m++) {
          a[m] = rows[first + i + m];
          UNROLL for (int g = 0; g < G; g++) sum[m][g] = bias[g];
        }
        multiply<M>(sum, a, packed + p * K * G * W, K);
        UNROLL for (int m = 0; m < M; m++)
          UNROLL for (int g = 0; g < G; g++) store(to + ((p * N + first + i + m) * S + g) * W, sum[m][g]);
      });
    }
  }

  void recur(int layer, int direction, const T* packed, const Group& group) const {
    const int64_t rows = group.active[0], row = P * W;
    const Rows<T> to = states(layer);
    auto memory = zeros<T>(3 * rows * row);
    T *now = memory.get(), *next = now + rows * row, *const cell = next + rows * row;
    for (int64_t step = 0; step < group.steps; step++) {
      const int64_t t = direction ? group.steps - 1 - step : step, at = group.at[t];
      for (int64_t p = 0; p < P; p++) {
        T* const kept = gates(layer, direction) + (p * N + at) * S * W;
        [[maybe_unused]] V<T> bias{};
        if constexpr (std::is_same_v<C, Gru>)
          bias = load_some(weights[2 * layer + direction].hidden_bias + 2 * hidden + p * W, units(p));
        in_tiles<C::TILE>(group.active[t], [&](int64_t i, auto height) INLINE_LAMBDA {
          constexpr int M = decltype(height)::value;
          const T* a[M];
          V<T> sum[M][G];
          UNROLL for (int m = 0; m < M; m++) {
            a[m] = now + (i + m) * row;
            UNROLL for (int g = 0; g < G; g++)
              sum[m][g] = C::joined_bias(g) ? load(kept + ((i + m) * S + g) * W) : bias;
          }
          multiply<M>(sum, a, packed + p * hidden * G * W, hidden);
          UNROLL for (int m = 0; m < M; m++) {
            T* const k = kept + (i + m) * S * W;
            V<T> h;
            if constexpr (std::is_same_v<C, Gru>) {
              const V<T> r = sigmoid<T>(sum[m][0]), z = sigmoid<T>(sum[m][1]);
              const V<T> n = hyperbolic_tangent(load(k + 2 * W) + r * sum[m][2]);
              h = n + z * (load(now + (i + m) * row + p * W) - n);
              store(k, r), store(k + W, z), store(k + 2 * W, n), store(k + 3 * W, sum[m][2]);
            } else {
              const V<T> in = sigmoid<T>(sum[m][0]), forget = sigmoid<T>(sum[m][1]);
              const V<T> g = hyperbolic_tangent(sum[m][2]), o = sigmoid<T>(sum[m][3]);
              T* const c = cell + (i + m) * row + p * W;
              const V<T> value = forget * load(c) + in * g;
              h = o * hyperbolic_tangent(value);
              store(c, value);
              store(k, in), store(k + W, forget), store(k + 2 * W, g), store(k + 3 * W, o), store(k + 4 * W, value);
            }
            store(next + (i + m) * row + p * W, h);
            store_some(to[at + i + m] + direction * hidden + p * W, h, units(p));
          }
        });
      }
      std::swap(now, next);
    }
  }

  void forward() const {
    const int64_t groups = layout.groups.size(), chunks = (N + CHUNK - 1) / CHUNK;
    int64_t most = 0;
    for (int layer = 0; layer < layers; layer++) most = std::max(most, inputs(layer));
    const int64_t one = P * G * W * most, other = P * G * W * hidden;
    auto packed = buffer<T>(2 * (one + other));
    T* const projection = packed.get();
    T* const recurrence = projection + 2 * one;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) nowait
      for (int64_t b = 0; b < batch; b++)  // positions past a row's length are zero
        std::fill(out + (b * width + length[b]) * 2 * hidden, out + (b + 1) * width * 2 * hidden, T(0));
      for (int layer = 0; layer < layers; layer++) {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < 2 * P; task++) {
          const int64_t direction = task / P, p = task % P;
          const Weights& w = weights[2 * layer + direction];
          pack_forward(projection + direction * one, w.input, inputs(layer), p);
          pack_forward(recurrence + direction * other, w.hidden, hidden, p);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < 2 * chunks; task++) {
          const int64_t direction = task / chunks, first = task % chunks * CHUNK;
          project(layer, direction, projection + direction * one, first, std::min(N, first + CHUNK));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < 2 * groups; task++) {
          const int64_t direction = task % 2;
          recur(layer, direction, recurrence + direction * other, layout.groups[task / 2]);
        }
      }
    }
  }

  // -- backward --

  // Column panel q of [G * hidden, K] -> [P][G][W][COLUMNS], the order in which gate gradients are stored.
  void pack_backward(T* to, const T* from, int64_t K, int64_t q) const {
    to += q * P * G * W * COLUMNS;
    const int64_t first = q * COLUMNS, columns = std::min(COLUMNS, K - first);
    for (int64_t p = 0; p < P; p++)
      for (int g = 0; g < G; g++)
        for (int64_t w = 0; w < W; w++, to += COLUMNS) {
          std::fill_n(to, COLUMNS, T(0));
          if (w < units(p)) std::copy_n(from + (g * hidden + p * W + w) * K + first, columns, to);
        }
  }

  // sum[m] += gradients of token `at + m` times one packed column panel; HIDDEN chooses the slots.
  template <int M, bool HIDDEN>
  INLINE void multiply_gates(V<T> (&sum)[M][WIDE], const T* gradients, int64_t at, const T* b) const {
    for (int64_t p = 0; p < P; p++)
      for (int g = 0; g < G; g++) {
        const int slot = HIDDEN ? C::hidden_slot(g) : C::input_slot(g);
        const T* a = gradients + ((p * GRADIENTS + slot) * N + at) * W;
        for (int w = 0; w < W; w++, b += COLUMNS) {
          V<T> column[WIDE];
          UNROLL for (int v = 0; v < WIDE; v++) column[v] = load(b + v * W);
          UNROLL for (int m = 0; m < M; m++) {
            const V<T> value = splat(a[m * W + w]);
            UNROLL for (int v = 0; v < WIDE; v++) sum[m][v] += value * column[v];
          }
        }
      }
  }

  // The recurrence backwards: gate gradients of all tokens of a group, and their sums over tokens for the biases.
  void recur_back(int layer, int direction, const Rows<const T>& grad, const T* packed, T* gradients, T* bias,
                  const Group& group) const {
    const int64_t rows = group.active[0];
    const Rows<T> h = states(layer);
    const T* const kept = gates(layer, direction);
    const int64_t* const previous = layout.previous[direction].data();
    auto memory = zeros<T>(2 * rows * padded);
    T *const dh = memory.get(), *const dc = dh + rows * padded;
    std::fill_n(bias, P * GRADIENTS * W, T(0));
    for (int64_t step = 0; step < group.steps; step++) {
      const int64_t t = direction ? step : group.steps - 1 - step, at = group.at[t], n = group.active[t];
      for (int64_t p = 0; p < P; p++) {
        V<T> total[GRADIENTS];
        for (int s = 0; s < GRADIENTS; s++) total[s] = load(bias + (p * GRADIENTS + s) * W);
        for (int64_t i = 0; i < n; i++) {
          const int64_t token = at + i, before = previous[token], column = direction * hidden + p * W;
          const T* const k = kept + (p * N + token) * S * W;
          T* const state_gradient = dh + i * padded + p * W;
          const V<T> d = load(state_gradient) + load_some(grad[token] + column, units(p));
          V<T> g[GRADIENTS];
          if constexpr (std::is_same_v<C, Gru>) {
            const V<T> r = load(k), z = load(k + W), candidate = load(k + 2 * W);
            const V<T> last = before < 0 ? V<T>{} : load_some(h[before] + column, units(p));
            g[2] = d * (T(1) - z) * (T(1) - candidate * candidate);
            g[3] = g[2] * r;
            g[0] = g[3] * (T(1) - r) * load(k + 3 * W);
            g[1] = d * (last - candidate) * z * (T(1) - z);
            store(state_gradient, d * z);
          } else {
            const V<T> in = load(k), forget = load(k + W), candidate = load(k + 2 * W), o = load(k + 3 * W);
            const V<T> c = hyperbolic_tangent(load(k + 4 * W));
            const V<T> last = before < 0 ? V<T>{} : load(kept + ((p * N + before) * S + 4) * W);
            T* const cell_gradient = dc + i * padded + p * W;
            const V<T> e = load(cell_gradient) + d * o * (T(1) - c * c);
            g[0] = e * candidate * in * (T(1) - in);
            g[1] = e * last * forget * (T(1) - forget);
            g[2] = e * in * (T(1) - candidate * candidate);
            g[3] = d * c * o * (T(1) - o);
            store(cell_gradient, e * forget);
            store(state_gradient, V<T>{});
          }
          for (int s = 0; s < GRADIENTS; s++) {
            store(gradients + ((p * GRADIENTS + s) * N + token) * W, g[s]);
            total[s] += g[s];
          }
        }
        for (int s = 0; s < GRADIENTS; s++) store(bias + (p * GRADIENTS + s) * W, total[s]);
      }
      for (int64_t q = 0; q < padded / COLUMNS; q++)
        in_tiles<TALL>(n, [&](int64_t i, auto height) INLINE_LAMBDA {
          constexpr int M = decltype(height)::value;
          V<T> sum[M][WIDE];
          T* const d = dh + i * padded + q * COLUMNS;
          UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int v = 0; v < WIDE; v++) sum[m][v] = load(d + m * padded + v * W);
          multiply_gates<M, true>(sum, gradients, at + i, packed + q * P * G * W * COLUMNS);
          UNROLL for (int m = 0; m < M; m++)
            UNROLL for (int v = 0; v < WIDE; v++) store(d + m * padded + v * W, sum[m][v]);
        });
    }
  }

  // Gradient of a layer's input for some tokens: both directions in one sum.
  void input_gradient(const Rows<T>& to, int64_t K, const T* gradients, const T* packed, int64_t size, int64_t first,
                      int64_t last) const {
    for (int64_t q = 0; q * COLUMNS < K; q++)
      in_tiles<TALL>(last - first, [&](int64_t i, auto height) INLINE_LAMBDA {
        constexpr int M = decltype(height)::value;
        V<T> sum[M][WIDE] = {};
        for (int direction = 0; direction < 2; direction++)
          multiply_gates<M, false>(sum, gradients + direction * P * N * GRADIENTS * W, first + i,
                                   packed + direction * size + q * P * G * W * COLUMNS);
        UNROLL for (int m = 0; m < M; m++)
          for (int v = 0; v < WIDE; v++) {
            const int64_t column = q * COLUMNS + v * W;
            if (column < K) store_some(to[first + i + m] + column, sum[m][v], K - column);
          }
      });
  }

  // total[W][COLUMNS] += one slot of the gate gradients of `count` tokens, transposed, times their packed rows; of
  // a row only the first COUNT vectors.
  template <int COUNT>
  static INLINE void accumulate(T* total, const T* a, const T* block, int64_t count) {
    constexpr int M = W < 16 / COUNT ? W : 16 / COUNT;
    for (int w = 0; w < W; w += M) {
      V<T> sum[M][COUNT] = {};
      for (int64_t k = 0; k < count; k++) {
        V<T> column[COUNT];
        UNROLL for (int v = 0; v < COUNT; v++) column[v] = load(block + k * COLUMNS + v * W);
        UNROLL for (int m = 0; m < M; m++) {
          const V<T> value = splat(a[k * W + w + m]);
          UNROLL for (int v = 0; v < COUNT; v++) sum[m][v] += value * column[v];
        }
      }
      UNROLL for (int m = 0; m < M; m++)
        UNROLL for (int v = 0; v < COUNT; v++) {
          T* const c = total + (w + m) * COLUMNS + v * W;
          store(c, load(c) + sum[m][v]);
        }
    }
  }

  // Panels first to last - 1 of a weight gradient [G * hidden, K]: gate gradients^T times rows, all tokens in order.
  // `from` maps a token to its row; null: the token itself.
  template <bool HIDDEN>
  void weight_gradient(T* to, int64_t K, const T* gradients, const Rows<const T>& rows, const int64_t* from,
                       int64_t first, int64_t last) const {
    const int64_t wide = (K + COLUMNS - 1) / COLUMNS, part = (last - first) * G * W * COLUMNS;
    auto memory = zeros<T>(wide * (part + BLOCK * COLUMNS));
    T *const total = memory.get(), *const block = total + wide * part;
    for (int64_t start = 0; start < N; start += BLOCK) {
      const int64_t count = std::min(BLOCK, N - start);
      for (int64_t k = 0; k < count; k++) {
        const int64_t token = from ? from[start + k] : start + k;
        const T* const row = token < 0 ? nullptr : rows[token];
        for (int64_t q = 0; q < wide; q++) {
          const int64_t columns = std::min(COLUMNS, K - q * COLUMNS);
          T* const line = block + (q * BLOCK + k) * COLUMNS;
          if (row) std::memcpy(line, row + q * COLUMNS, columns * sizeof(T));
          else std::fill_n(line, columns, T(0));
        }
      }
      for (int64_t q = 0; q < wide; q++)
        for (int64_t p = first; p < last; p++)
          for (int g = 0; g < G; g++) {
            const int slot = HIDDEN ? C::hidden_slot(g) : C::input_slot(g);
            const T* const a = gradients + ((p * GRADIENTS + slot) * N + start) * W;
            T* const c = total + q * part + ((p - first) * G + g) * W * COLUMNS;
            const int64_t columns = K - q * COLUMNS;
            if (columns <= W) accumulate<1>(c, a, block + q * BLOCK * COLUMNS, count);
            else if (columns <= 2 * W) accumulate<2>(c, a, block + q * BLOCK * COLUMNS, count);
            else accumulate<WIDE>(c, a, block + q * BLOCK * COLUMNS, count);
          }
    }
    for (int64_t q = 0; q < wide; q++)
      for (int64_t p = first; p < last; p++)
        for (int g = 0; g < G; g++)
          for (int64_t w = 0; w < units(p); w++)
            std::copy_n(total + q * part + (((p - first) * G + g) * W + w) * COLUMNS,
                        std::min(COLUMNS, K - q * COLUMNS),
                        to + (g * hidden + p * W + w) * K + q * COLUMNS);
  }

  // gradient_out [B, L, 2 hidden] -> gradients of all weights, and of x where dx is not null (zero past a length).
  // work: room for the gate gradients of one layer, [direction][panel][slot][token][W], and for the gradients of the
  // hidden states between layers, of two layers at a time.
  void backward(const T* gradient_out, T* dx, const Gradients* dweights, T* work) const {
    const int64_t groups = layout.groups.size(), chunks = (N + CHUNK - 1) / CHUNK;
    int64_t most = 0;
    for (int layer = 0; layer < layers; layer++) most = std::max(most, inputs(layer));
    const int64_t line = P * G * W, one = line * round_up(most, COLUMNS), other = line * padded;
    auto packed = buffer<T>(2 * (one + other));
    T* const projection = packed.get();
    T* const recurrence = projection + 2 * one;
    const int64_t size = P * N * GRADIENTS * W, sums = P * GRADIENTS * W;
    T* const between = work + 2 * size;
    auto bias = buffer<T>(2 * groups * sums);
#pragma omp parallel num_threads(threads)
    {
      if (dx) {
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < batch; b++)
          std::fill(dx + (b * width + length[b]) * features, dx + (b + 1) * width * features, T(0));
      }
      for (int layer = layers - 1; layer >= 0; layer--) {
        const int64_t K = inputs(layer), wide = (K + COLUMNS - 1) / COLUMNS, own = padded / COLUMNS;
        const bool below = layer || dx;
        const Rows<T> lower =
            layer ? Rows<T>{between + ((layer - 1) % 2) * N * 2 * hidden, 2 * hidden, nullptr}
                  : Rows<T>{dx, features, layout.place.data()};
        const Rows<const T> upper =
            layer < layers - 1 ? Rows<const T>{between + (layer % 2) * N * 2 * hidden, 2 * hidden, nullptr}
                               : Rows<const T>{gradient_out, 2 * hidden, layout.place.data()};
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < 2 * (wide + own); task++) {
          const int64_t direction = task % 2, q = task / 2;
          const Weights& w = weights[2 * layer + direction];
          if (q < own) pack_backward(recurrence + direction * other, w.hidden, hidden, q);
          else if (below) pack_backward(projection + direction * one, w.input, K, q - own);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < 2 * groups; task++) {
          const int64_t direction = task % 2;
          recur_back(layer, direction, upper, recurrence + direction * other, work + direction * size,
                     bias.get() + task * sums, layout.groups[task / 2]);
        }
        const int64_t shares = (P + SHARE - 1) / SHARE;
        const int64_t weight_tasks = 4 * shares, tasks = weight_tasks + (below ? chunks : 0) + 2;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; task++) {
          if (task < weight_tasks) {
            const int64_t direction = task % 2, first = task / 4 * SHARE, last = std::min(P, first + SHARE);
            const Gradients& d = dweights[2 * layer + direction];
            const T* const gradients = work + direction * size;
            if (task / 2 % 2) {
              weight_gradient<false>(d.input, K, gradients, input(layer), nullptr, first, last);
            } else {
              const Rows<T> h = states(layer);
              weight_gradient<true>(d.hidden, hidden, gradients,
                                    Rows<const T>{h.data + direction * hidden, h.stride, h.place},
                                    layout.previous[direction].data(), first, last);
            }
          } else if (task < tasks - 2) {
            const int64_t first = (task - weight_tasks) * CHUNK;
            input_gradient(lower, K, work, projection, one, first, std::min(N, first + CHUNK));
          } else {
            const int64_t direction = tasks - 1 - task;
            const Gradients& d = dweights[2 * layer + direction];
            for (int g = 0; g < G; g++)
              for (int64_t j = 0; j < hidden; j++) {
                const T* from = bias.get() + direction * sums + j / W * GRADIENTS * W + j % W;
                T input = 0, hid = 0;
                for (int64_t group = 0; group < groups; group++, from += 2 * sums) {
                  input += from[C::input_slot(g) * W];
                  hid += from[C::hidden_slot(g) * W];
                }
                d.input_bias[g * hidden + j] = input;
                d.hidden_bias[g * hidden + j] = hid;
              }
          }
        }
      }
    }
  }
};

template <class T, class C>
void run(int layers, int64_t batch, int64_t width, int64_t features, int64_t hidden, const int64_t* length, const T* x,
         const void* weights, T* out, T* state, int threads, const T* gradient_out, T* dx, const void* dweights,
         T* work) {
  using Net = Network<T, C>;
  const Net net(layers, batch, width, features, hidden, length, x, weights, out, state, threads);
  if (gradient_out) net.backward(gradient_out, dx, static_cast<const typename Net::Gradients*>(dweights), work);
  else net.forward();
}

}  // namespace

#ifndef REAL
#define REAL float
#endif

// One entry: forward where gradient_out is null, else backward. Sizes are checked by the caller.
extern "C" void recurrent(int lstm, int layers, int64_t batch, int64_t width, int64_t features, int64_t hidden,
                          const int64_t* length, const REAL* x, const void* weights, REAL* out, REAL* state,
                          int threads, const REAL* gradient_out, REAL* dx, const void* dweights, REAL* work) {
  (lstm ? run<REAL, Lstm> : run<REAL, Gru>)(layers, batch, width, features, hidden, length, x, weights, out, state,
                                            threads, gradient_out, dx, dweights, work);
}
