// Grouped MLPs and the concat critic: forward and backward, float and double.
//
// Layout. Hidden layers are kept feature-major in blocks of PANEL samples: block[feature][sample], so that a product
// W h needs neither a packed nor a transposed weight: rows of W are broadcast, samples fill the vectors. A block is
// narrower, in whole vectors, where fewer samples are left. Only the weight gradients, sums over samples, need the
// layers sample-major; they are transposed panel by panel.
//
// Determinism. Every output element is summed in one fixed order by one thread. The concat critic's weight gradients
// are partial sums of each thread, over rows assigned by their number, added in the threads' order.

#include <limits>
#include <vector>

#include "products.h"
#include "threads.h"

namespace {

// Samples cut into blocks of PANEL.
struct Blocks {
  int64_t samples, padded, count;
  explicit Blocks(int64_t n) : samples(n), padded(round_up(n, W)), count((n + PANEL - 1) / PANEL) {}
  int64_t begin(int64_t b) const { return b * PANEL; }
  int64_t size(int64_t b) const { return std::min(PANEL, samples - b * PANEL); }     // samples
  int64_t width(int64_t b) const { return std::min(PANEL, padded - b * PANEL); }     // with padding
};

// As torch: NaN passes, forward and backward.
INLINE V positive(V v) { return v < 0 ? V{} : v; }
INLINE V where_positive(V kept, V v) { return kept <= 0 ? V{} : v; }

// out = relu(weight in + bias), [rows][width] from [depth][width]
void dense(const T* weight, const T* bias, const T* in, T* out, int64_t rows, int64_t depth, int64_t width, bool relu) {
  const Part part{weight, depth, in, depth};
  if (relu)
    product<false>(&part, 1, rows, width / W, width, out, width,
                   [=](T* at, int64_t m, int, V sum) { store(at, positive(sum + bias[m])); });
  else
    product<false>(&part, 1, rows, width / W, width, out, width,
                   [=](T* at, int64_t m, int, V sum) { store(at, sum + bias[m]); });
}

// out = (weight^T grad) where kept > 0, [columns][width] from [rows][width]
void dense_backward(const T* weight, const T* grad, const T* kept, T* out, int64_t rows, int64_t columns, int64_t width) {
  const Part part{weight, columns, grad, rows};
  product<true>(&part, 1, columns, width / W, width, out, width, [=](T* at, int64_t m, int v, V sum) {
    store(at, where_positive(load(kept + m * width + v * W), sum));
  });
}

void row_sums(const T* rows, int64_t count, int64_t width, T* sums) {
  for (int64_t m = 0; m < count; m++) {
    V sum{};
    for (int64_t c = 0; c < width; c += W) sum += load(rows + m * width + c);
    sums[m] += total(sum);
  }
}

struct Grouped {
  int64_t inputs;
  const int64_t *counts, *dims;
  int64_t batch, hidden, out, layers;  // layers: hidden ones
  const T *const *x, *const *weights;  // per input weight and bias of first layers, then of further layers
  T* state;
  Blocks blocks;
  int64_t towers = 0;
  std::vector<int64_t> input, place;   // of a tower: its input, its number among those that read it

  Grouped(int64_t inputs, const int64_t* counts, const int64_t* dims, int64_t batch, int64_t hidden, int64_t out,
          int64_t layers, const T* const* x, const T* const* weights, T* state)
      : inputs(inputs), counts(counts), dims(dims), batch(batch), hidden(hidden), out(out), layers(layers), x(x),
        weights(weights), state(state), blocks(batch) {
    for (int64_t i = 0; i < inputs; i++)
      for (int64_t n = 0; n < counts[i]; n++) { input.push_back(i); place.push_back(n); towers++; }
  }
  int64_t rows(int64_t layer) const { return layer < layers ? hidden : out; }
  int64_t depth(int64_t layer, int64_t n) const { return layer ? hidden : dims[input[n]]; }
  const T* weight(int64_t layer, int64_t n) const {
    if (layer == 0) return weights[2 * input[n]] + place[n] * hidden * dims[input[n]];
    return weights[2 * (inputs + layer - 1)] + n * rows(layer) * hidden;
  }
  const T* bias(int64_t layer, int64_t n) const {
    if (layer == 0) return weights[2 * input[n] + 1] + place[n] * hidden;
    return weights[2 * (inputs + layer - 1) + 1] + n * rows(layer);
  }
  // a block of a hidden layer of a tower
  T* block(int64_t layer, int64_t n, int64_t b) const {
    return state + ((layer * towers + n) * blocks.padded + blocks.begin(b)) * hidden;
  }
};

// Outputs [tower][sample][out], or with `blocked` in blocks, feature-major.
void forward(const Grouped& g, T* out, T* blocked, int threads) {
  const Blocks& blocks = g.blocks;
  std::vector<int64_t> offset(g.inputs + 1, 0);
  for (int64_t i = 0; i < g.inputs; i++) offset[i + 1] = offset[i] + g.dims[i] * blocks.padded;
  const Buffer turned = buffer(offset[g.inputs]);
#pragma omp parallel num_threads(threads)
  {
    const Buffer last = buffer(g.out * PANEL);
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < g.inputs * blocks.count; t++) {
      const int64_t i = t / blocks.count, b = t % blocks.count, d = g.dims[i];
      transpose(g.x[i] + blocks.begin(b) * d, d, blocks.size(b), d, turned.get() + offset[i] + blocks.begin(b) * d,
                blocks.width(b), blocks.width(b));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < g.towers * blocks.count; t++) {
      const int64_t n = t / blocks.count, b = t % blocks.count, width = blocks.width(b), i = g.input[n];
      const T* in = turned.get() + offset[i] + blocks.begin(b) * g.dims[i];
      for (int64_t layer = 0; layer <= g.layers; layer++) {
        T* to = layer < g.layers ? g.block(layer, n, b)
                : blocked        ? blocked + (n * blocks.padded + blocks.begin(b)) * g.out
                                 : last.get();
        dense(g.weight(layer, n), g.bias(layer, n), in, to, g.rows(layer), g.depth(layer, n), width, layer < g.layers);
        in = to;
      }
      if (blocked) continue;
      transpose(last.get(), width, g.out, blocks.size(b), out + (n * g.batch + blocks.begin(b)) * g.out, g.out, g.out);
    }
  }
}

// Gradients of weights (dw null: not wanted) and inputs (dx null), from those of the outputs: [tower][sample][out], or
// with `scale`, one factor a tower, in blocks.
struct Backward {
  const Grouped& g;
  const T *grad, *scale;
  T *const *dx, *const *dw;
  Buffer first;  // gradients of the first layers' outputs, which those of the inputs are sums of

  Backward(const Grouped& g, const T* grad, const T* scale, T* const* dx, T* const* dw)
      : g(g), grad(grad), scale(scale), dx(dx), dw(dw), first(buffer(g.towers * g.hidden * g.blocks.padded)) {}

  // gradients of a tower's further layers take this much memory
  int64_t tower_size() const { return ((g.layers - 1) * g.hidden + g.out) * g.blocks.padded; }
  T* block(T* memory, int64_t layer, int64_t n, int64_t b) const {
    T* at = layer ? memory + (layer - 1) * g.hidden * g.blocks.padded : first.get() + n * g.hidden * g.blocks.padded;
    return at + g.blocks.begin(b) * g.rows(layer);
  }

  void chain(T* memory, int64_t n, int64_t b) const {
    const int64_t width = g.blocks.width(b);
    T* to = block(memory, g.layers, n, b);
    if (scale) {
      const T* from = grad + (n * g.blocks.padded + g.blocks.begin(b)) * g.out;
      for (int64_t c = 0; c < g.out * width; c += W) store(to + c, load(from + c) * scale[n]);
    } else {
      transpose(grad + (n * g.batch + g.blocks.begin(b)) * g.out, g.out, g.blocks.size(b), g.out, to, width, width);
    }
    for (int64_t layer = g.layers; layer > 0; layer--)
      dense_backward(g.weight(layer, n), block(memory, layer, n, b), g.block(layer - 1, n, b),
                     block(memory, layer - 1, n, b), g.rows(layer), g.hidden, width);
  }

  void weights(T* memory, int64_t layer, int64_t n, T* samples) const {
    const Blocks& blocks = g.blocks;
    const int64_t rows = g.rows(layer), depth = g.depth(layer, n);
    const int64_t stack = layer ? g.inputs + layer - 1 : g.input[n], at = layer ? n : g.place[n];
    T* of_weight = dw[2 * stack] + at * rows * depth;
    T* of_bias = dw[2 * stack + 1] + at * rows;
    std::fill(of_bias, of_bias + rows, T(0));
    std::vector<Part> parts(blocks.count);
    for (int64_t b = 0; b < blocks.count; b++) {
      const T* d = block(memory, layer, n, b);
      parts[b] = {d, blocks.width(b), samples + blocks.begin(b) * PANEL, blocks.width(b)};
      row_sums(d, rows, blocks.width(b), of_bias);
    }
    for (int64_t c = 0; c < depth; c += PANEL) {
      const int64_t columns = std::min(PANEL, depth - c);
      for (int64_t b = 0; b < blocks.count; b++) {
        T* to = samples + blocks.begin(b) * PANEL;
        if (layer) {
          const T* h = g.block(layer - 1, n, b) + c * blocks.width(b);
          transpose(h, blocks.width(b), columns, blocks.width(b), to, PANEL, round_up(columns, W));
        } else {
          std::fill(to, to + blocks.width(b) * PANEL, T(0));
          for (int64_t r = 0; r < blocks.size(b); r++)
            std::copy_n(g.x[g.input[n]] + (blocks.begin(b) + r) * depth + c, columns, to + r * PANEL);
        }
      }
      product<false>(parts.data(), int(blocks.count), rows, (columns + W - 1) / W, PANEL, of_weight + c, depth,
                     [=](T* at, int64_t, int v, V sum) { store_some(at, sum, columns - v * W); });
    }
  }

  void input(int64_t i, int64_t b) const {
    const int64_t d = g.dims[i], width = g.blocks.width(b);
    std::vector<Part> parts;
    for (int64_t n = 0; n < g.towers; n++)
      if (g.input[n] == i) parts.push_back({g.weight(0, n), d, block(nullptr, 0, n, b), g.hidden});
    const Buffer turned = buffer(d * width);
    T* to = turned.get();
    product<true>(parts.data(), int(parts.size()), d, width / W, width, to, width,
                  [=](T* at, int64_t, int, V sum) { store(at, sum); });
    transpose(to, width, d, g.blocks.size(b), dx[i] + g.blocks.begin(b) * d, d, d);
  }

  void run(int threads) const {
    // A tower at a time leaves its gradients in the caches; more threads than towers share them.
    const bool whole = threads <= g.towers;
    const Buffer memory = buffer((whole ? threads : g.towers) * tower_size());
#pragma omp parallel num_threads(threads)
    {
      const Buffer samples = buffer(g.blocks.padded * PANEL);
      if (whole) {
        T* mine = memory.get() + omp_get_thread_num() * tower_size();
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < g.towers; n++) {
          for (int64_t b = 0; b < g.blocks.count; b++) chain(mine, n, b);
          for (int64_t layer = 0; dw && layer <= g.layers; layer++) weights(mine, layer, n, samples.get());
        }
      } else {
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < g.towers * g.blocks.count; t++) {
          const int64_t n = t / g.blocks.count;
          chain(memory.get() + n * tower_size(), n, t % g.blocks.count);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t t = 0; t < (dw ? g.layers + 1 : 0) * g.towers; t++) {
          const int64_t n = t % g.towers;
          weights(memory.get() + n * tower_size(), g.layers - t / g.towers, n, samples.get());
        }
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < (dx ? g.inputs : 0) * g.blocks.count; t++) input(t / g.blocks.count, t % g.blocks.count);
    }
  }
};

// InfoNCE of scores <q_i, k_j>, a block of rows i at a time, and the gradients of the mean loss. q, k and their gradients
// are blocks [feature][sample] of a tower.
struct Pairs {
  const Blocks& blocks;
  int64_t width, padded;
  Buffer scores, turned;

  Pairs(const Blocks& blocks, int64_t width)
      : blocks(blocks), width(width), padded(blocks.padded), scores(buffer(PANEL * padded)),
        turned(buffer(PANEL * padded)) {}

  // Mean loss; NaN where a score is not finite. of_q, of_k: null where gradients are not wanted.
  T run(const T* q, const T* k, T* of_q, T* of_k) const {
    const int64_t n = blocks.samples;
    T loss = 0;
    for (int64_t a = 0; a < blocks.count; a++) {
      const int64_t size = blocks.size(a), wide = blocks.width(a);
      T *const s = scores.get(), *const t = turned.get();
      const T* const mine = q + blocks.begin(a) * width;
      for (int64_t b = 0; b < blocks.count; b++) {
        const Part part{mine, wide, k + blocks.begin(b) * width, width};
        product<true>(&part, 1, size, blocks.width(b) / W, blocks.width(b), s + blocks.begin(b), padded,
                      [](T* at, int64_t, int, V sum) { store(at, sum); });
      }
      for (int64_t i = 0; i < size; i++) {
        T* row = s + i * padded;
        const int64_t own = blocks.begin(a) + i;
        std::fill(row + n, row + padded, row[0]);
        V most = load(row), check = most - most;  // check: 0, or NaN where a score is not finite
        for (int64_t j = W; j < padded; j += W) {
          const V v = load(row + j);
          most = v > most ? v : most;
          check += v - v;
        }
        const T top = largest(most), joint = row[own];
        for (int64_t j = 0; j < padded; j += W) store(row + j, exponential(load(row + j) - top));
        std::fill(row + n, row + padded, T(0));
        V sums{};
        for (int64_t j = 0; j < padded; j += W) sums += load(row + j);
        const T sum = total(sums);
        loss += std::log(sum) - (joint - top) + total(check);
        if (!of_q) continue;
        row[own] = 0;
        V others{};
        for (int64_t j = 0; j < padded; j += W) {
          const V share = load(row + j) * (1 / (sum * T(n)));
          store(row + j, share);
          others += share;
        }
        row[own] = -total(others);  // a row's gradients sum to zero: no digits are lost where the positive has all
      }
      if (!of_q) continue;
      transpose(s, padded, size, n, t, wide, wide);
      for (int64_t b = 0; b < blocks.count; b++) {
        const Part part{mine, wide, s + blocks.begin(b), size};
        const bool adds = a > 0;
        product<false>(&part, 1, width, blocks.width(b) / W, padded, of_k + blocks.begin(b) * width, blocks.width(b),
                       [=](T* at, int64_t, int, V sum) { store(at, adds ? load(at) + sum : sum); });
      }
      std::vector<Part> parts;
      for (int64_t b = 0; b < blocks.count; b++)
        parts.push_back({k + blocks.begin(b) * width, blocks.width(b), t + blocks.begin(b) * wide, blocks.size(b)});
      T* to = of_q + blocks.begin(a) * width;
      product<false>(parts.data(), int(parts.size()), width, wide / W, wide, to, wide,
                     [](T* at, int64_t, int, V sum) { store(at, sum); });
    }
    return loss / T(n);
  }
};

// InfoNCE of critics with rows q[c] and columns k[c], numbers of towers. outputs: of all towers in blocks; with
// `of_outputs` the gradients of each critic's mean loss are written there.
void grouped_loss(const Grouped& g, const int64_t* q, const int64_t* k, int64_t critics, T* losses, T* outputs,
                  T* of_outputs, int threads) {
  forward(g, nullptr, outputs, threads);
  const int64_t tower = g.blocks.padded * g.out;
#pragma omp parallel num_threads(threads)
  {
    const Pairs pairs(g.blocks, g.out);
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < critics; c++) {
      T *of_q = of_outputs ? of_outputs + q[c] * tower : nullptr, *of_k = of_q ? of_outputs + k[c] * tower : nullptr;
      losses[c] = pairs.run(outputs + q[c] * tower, outputs + k[c] * tower, of_q, of_k);
    }
  }
}

// The concat critic after its first layer: h[j] = relu(of_column[j] + of_row[i]), then `layers` - 1 further hidden
// layers and a last one of one output. Scores of a row are worked on in blocks of columns.
struct Concat {
  int64_t rows, hidden, layers;
  const T *of_row, *of_column;  // [rows][hidden], [columns][hidden]
  const T* const* weights;      // weight and bias of the further layers, last one included
  Blocks blocks;                // of columns
  Buffer turned;                // of_column, feature-major

  Concat(int64_t rows, int64_t columns, int64_t hidden, int64_t layers, const T* of_row, const T* of_column,
         const T* const* weights)
      : rows(rows), hidden(hidden), layers(layers), of_row(of_row), of_column(of_column), weights(weights),
        blocks(columns), turned(buffer(blocks.padded * hidden)) {
    for (int64_t b = 0; b < blocks.count; b++)
      transpose(of_column + blocks.begin(b) * hidden, hidden, blocks.size(b), hidden,
                turned.get() + blocks.begin(b) * hidden, blocks.width(b), blocks.width(b));
  }

  // numbers in the hidden layers of one block
  int64_t block_size() const { return layers * hidden * PANEL; }
  // layer of a block whose layers are at h
  T* layer_of(T* h, int64_t layer) const { return h + layer * hidden * PANEL; }

  // all hidden layers of row i against block b, into h; its scores, with padding, into `scores`
  void forward(int64_t i, int64_t b, T* h, T* scores) const {
    const int64_t width = blocks.width(b);
    const T* u = turned.get() + blocks.begin(b) * hidden;
    for (int64_t f = 0; f < hidden; f++) {
      const V add = splat(of_row[i * hidden + f]);
      for (int64_t c = 0; c < width; c += W) store(h + f * width + c, positive(load(u + f * width + c) + add));
    }
    for (int64_t layer = 1; layer < layers; layer++)
      dense(weights[2 * layer - 2], weights[2 * layer - 1], layer_of(h, layer - 1), layer_of(h, layer), hidden, hidden,
            width, true);
    const T *last = weights[2 * layers - 2], *top = layer_of(h, layers - 1);
    for (int64_t c = 0; c < width; c += W) {
      V sum = splat(weights[2 * layers - 1][0]);
      for (int64_t f = 0; f < hidden; f++) sum += last[f] * load(top + f * width + c);
      store(scores + c, sum);
    }
  }
};

constexpr int64_t GROUP = 4;  // blocks whose weight gradients are one product

// What a thread adds up: gradients of the columns' part of the first layer, feature-major, then of weights and biases of
// the further layers.
struct ConcatGradients {
  const Concat& k;
  bool of_weights;
  int64_t square, size;
  Buffer partial, memory, samples;
  int64_t memory_size, samples_size;

  ConcatGradients(const Concat& k, bool of_weights, int threads)
      : k(k), of_weights(of_weights), square(k.hidden * k.hidden + k.hidden),
        size(k.blocks.padded * k.hidden + (k.layers - 1) * square + k.hidden + 1), partial(buffer(threads * size)),
        memory_size(2 * GROUP * k.hidden * PANEL), samples_size(GROUP * PANEL * PANEL) {
    memory = buffer(threads * memory_size);
    samples = buffer(threads * samples_size);
  }

  void clear(int thread) { std::fill_n(partial.get() + thread * size, size, T(0)); }

  // Adds the gradients of blocks b0 .. b0 + count of row i, count <= GROUP; their layers are at h, one block after
  // another, and gradients of their scores, zero in the padding, at `grads`. Adds to dof_row.
  void add(int thread, int64_t i, int64_t b0, int64_t count, T* h, const T* grads, T* dof_row) {
    const int64_t hidden = k.hidden, layers = k.layers;
    T* mine = partial.get() + thread * size;
    T* of_layers = mine + k.blocks.padded * hidden;
    T* of_last = of_layers + (layers - 1) * square;
    T* d[2] = {memory.get() + thread * memory_size, memory.get() + thread * memory_size + memory_size / 2};
    T* turned = samples.get() + thread * samples_size;
    const T* last = k.weights[2 * layers - 2];
    T *now = d[0], *next = d[1];
    for (int64_t g = 0; g < count; g++) {
      const int64_t width = k.blocks.width(b0 + g);
      const T *weight = grads + g * PANEL, *top = k.layer_of(h + g * k.block_size(), layers - 1);
      T* to = now + g * hidden * PANEL;
      for (int64_t c = 0; c < width; c++) of_last[hidden] += weight[c];
      for (int64_t f = 0; f < hidden; f++) {
        V sum{};
        for (int64_t c = 0; c < width; c += W) {
          const V value = load(top + f * width + c);
          sum += load(weight + c) * value;
          store(to + f * width + c, where_positive(value, load(weight + c) * last[f]));
        }
        of_last[f] += total(sum);
      }
    }
    for (int64_t layer = layers - 1; layer > 0; layer--) {
      if (of_weights) weights(layer, b0, count, h, now, turned, of_layers + (layer - 1) * square);
      for (int64_t g = 0; g < count; g++)
        dense_backward(k.weights[2 * layer - 2], now + g * hidden * PANEL, k.layer_of(h + g * k.block_size(), layer - 1),
                       next + g * hidden * PANEL, hidden, hidden, k.blocks.width(b0 + g));
      std::swap(now, next);
    }
    for (int64_t g = 0; g < count; g++) {
      const int64_t width = k.blocks.width(b0 + g);
      const T* from = now + g * hidden * PANEL;
      row_sums(from, hidden, width, dof_row + i * hidden);
      T* to = mine + k.blocks.begin(b0 + g) * hidden;
      for (int64_t c = 0; c < hidden * width; c += W) store(to + c, load(to + c) + load(from + c));
    }
  }

  void weights(int64_t layer, int64_t b0, int64_t count, T* h, const T* grad, T* turned, T* of_weight) const {
    const int64_t hidden = k.hidden;
    Part parts[GROUP];
    for (int64_t g = 0; g < count; g++) {
      const int64_t width = k.blocks.width(b0 + g);
      parts[g] = {grad + g * hidden * PANEL, width, turned + g * PANEL * PANEL, width};
      row_sums(parts[g].a, hidden, width, of_weight + hidden * hidden);
    }
    for (int64_t c = 0; c < hidden; c += PANEL) {
      const int64_t columns = std::min(PANEL, hidden - c);
      for (int64_t g = 0; g < count; g++) {
        const int64_t width = k.blocks.width(b0 + g);
        transpose(k.layer_of(h + g * k.block_size(), layer - 1) + c * width, width, columns, width,
                  turned + g * PANEL * PANEL, PANEL, round_up(columns, W));
      }
      product<false>(parts, int(count), hidden, (columns + W - 1) / W, PANEL, of_weight + c, hidden,
                     [=](T* at, int64_t, int v, V sum) {
                       const int64_t n = columns - v * W;
                       V before{};
                       if (n >= W) before = load(at); else std::memcpy(&before, at, n * sizeof(T));
                       store_some(at, before + sum, n);
                     });
    }
  }

  // the threads' sums, in their order; within a parallel region
  void reduce(int team, T* dof_column, T* const* dw) {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < size; c++)
      for (int other = 1; other < team; other++) partial[c] += partial[other * size + c];
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < k.blocks.count; b++)
      transpose(partial.get() + k.blocks.begin(b) * k.hidden, k.blocks.width(b), k.hidden, k.blocks.size(b),
                dof_column + k.blocks.begin(b) * k.hidden, k.hidden, k.hidden);
    if (!dw) return;
#pragma omp for schedule(static) nowait
    for (int64_t layer = 1; layer <= k.layers; layer++) {
      const T* from = partial.get() + k.blocks.padded * k.hidden + (layer - 1) * square;
      const int64_t count = layer < k.layers ? k.hidden * k.hidden : k.hidden;
      std::copy_n(from, count, dw[2 * layer - 2]);
      std::copy_n(from + count, layer < k.layers ? k.hidden : 1, dw[2 * layer - 1]);
    }
  }
};

void concat_forward(const Concat& k, T* scores, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const Buffer h = buffer(k.block_size());
    T row[PANEL];
#pragma omp for schedule(dynamic, 1)
    for (int64_t t = 0; t < k.rows * k.blocks.count; t++) {
      const int64_t i = t / k.blocks.count, b = t % k.blocks.count;
      k.forward(i, b, h.get(), row);
      std::copy_n(row, k.blocks.size(b), scores + i * k.blocks.samples + k.blocks.begin(b));
    }
  }
}

// dof_row, dof_column: gradients of the two parts of the first layer. dw: of the further layers' weights and biases;
// null where not wanted.
void concat_backward(const Concat& k, const T* grad, T* dof_row, T* dof_column, T* const* dw, int threads) {
  ConcatGradients sums(k, dw != nullptr, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    const Buffer h = buffer(GROUP * k.block_size());
    T scores[PANEL], grads[GROUP * PANEL];
    sums.clear(thread);
    for (int64_t i = k.rows * thread / team; i < k.rows * (thread + 1) / team; i++) {
      std::fill_n(dof_row + i * k.hidden, k.hidden, T(0));
      for (int64_t b0 = 0; b0 < k.blocks.count; b0 += GROUP) {
        const int64_t count = std::min(GROUP, k.blocks.count - b0);
        std::fill(grads, grads + GROUP * PANEL, T(0));
        for (int64_t g = 0; g < count; g++) {
          k.forward(i, b0 + g, h.get() + g * k.block_size(), scores);
          std::copy_n(grad + i * k.blocks.samples + k.blocks.begin(b0 + g), k.blocks.size(b0 + g), grads + g * PANEL);
        }
        sums.add(thread, i, b0, count, h.get(), grads, dof_row);
      }
    }
#pragma omp barrier
    sums.reduce(team, dof_column, dw);
  }
}

// InfoNCE of every row, -log softmax at the diagonal, and with dof_row the gradients of its mean over rows, in one pass:
// a row's hidden layers are still at hand when the gradients of its scores are known.
void concat_infonce(const Concat& k, T* losses, T* dof_row, T* dof_column, T* const* dw, int threads) {
  ConcatGradients sums(k, dw != nullptr, dof_row ? threads : 0);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    const Buffer h = buffer((dof_row ? k.blocks.count : 1) * k.block_size()), row = buffer(k.blocks.count * PANEL);
    T* scores = row.get();
    if (dof_row) sums.clear(thread);
    for (int64_t i = k.rows * thread / team; i < k.rows * (thread + 1) / team; i++) {
      for (int64_t b = 0; b < k.blocks.count; b++)
        k.forward(i, b, h.get() + (dof_row ? b * k.block_size() : 0), scores + b * PANEL);
      // the blocks' scores follow one another, padding only at the end
      const int64_t n = k.blocks.samples;
      T most = scores[0], sum = 0, check = 0;
      for (int64_t j = 0; j < n; j++) {
        most = std::max(most, scores[j]);
        check += scores[j] - scores[j];  // 0, or NaN where a score is not finite
      }
      const T joint = scores[i];
      for (int64_t j = 0; j < n; j++) sum += scores[j] = std::exp(scores[j] - most);
      losses[i] = std::log(sum) - (joint - most) + check;
      if (!dof_row) continue;
      const T factor = 1 / (sum * T(k.rows));
      T others = 0;
      for (int64_t j = 0; j < n; j++) others += (j == i) ? T(0) : (scores[j] *= factor);
      scores[i] = -others;  // a row's gradients sum to zero: no digits are lost where the positive has all the weight
      std::fill(scores + n, scores + k.blocks.count * PANEL, T(0));
      std::fill_n(dof_row + i * k.hidden, k.hidden, T(0));
      for (int64_t b0 = 0; b0 < k.blocks.count; b0 += GROUP)
        sums.add(thread, i, b0, std::min(GROUP, k.blocks.count - b0), h.get() + b0 * k.block_size(), scores + b0 * PANEL,
                 dof_row);
    }
#pragma omp barrier
    if (dof_row) sums.reduce(team, dof_column, dw);
  }
}

}  // namespace

extern "C" void grouped_mlp(int64_t inputs, const int64_t* counts, const int64_t* dims, int64_t batch, int64_t hidden,
                            int64_t out, int64_t layers, const T* const* x, const T* const* weights, T* state, T* result,
                            int threads, const T* grad, const T* scale, T* const* dx, T* const* dw) {
  const Grouped g(inputs, counts, dims, batch, hidden, out, layers, x, weights, state);
  if (grad) Backward(g, grad, scale, dx, dw).run(threads);
  else forward(g, result, nullptr, threads);
}

extern "C" void grouped_infonce(int64_t inputs, const int64_t* counts, const int64_t* dims, int64_t batch,
                                int64_t hidden, int64_t out, int64_t layers, const T* const* x,
                                const T* const* weights, T* state, int64_t critics, const int64_t* q, const int64_t* k,
                                T* losses, T* outputs, T* of_outputs, int threads) {
  const Grouped g(inputs, counts, dims, batch, hidden, out, layers, x, weights, state);
  grouped_loss(g, q, k, critics, losses, outputs, of_outputs, threads);
}

extern "C" void concat(int64_t rows, int64_t columns, int64_t hidden, int64_t layers, const T* of_row,
                       const T* of_column, const T* const* weights, T* scores, int threads, const T* grad, T* dof_row,
                       T* dof_column, T* const* dw) {
  const Concat k(rows, columns, hidden, layers, of_row, of_column, weights);
  if (grad) concat_backward(k, grad, dof_row, dof_column, dw, threads);
  else concat_forward(k, scores, threads);
}

extern "C" void concat_loss(int64_t rows, int64_t hidden, int64_t layers, const T* of_row, const T* of_column,
                            const T* const* weights, T* losses, int threads, T* dof_row, T* dof_column, T* const* dw) {
  concat_infonce(Concat(rows, rows, hidden, layers, of_row, of_column, weights), losses, dof_row, dof_column, dw,
                 threads);
}
