// Scores <q_i, k_j> of a block of rows against all columns: their exponentials, and the sums that gradients consist of.
//
// Layout. The block is kept transposed, in panels of PANEL rows: panel[column][row]. Then none of the three products needs
// an operand turned: scores broadcast numbers of k, the columns' sums numbers of the block, the rows' sums read it as it
// lies.
//
// Determinism. A thread owns a range of columns. What is summed over columns is summed in the threads' order.

#include <limits>

#include "products.h"
#include "threads.h"

namespace {

constexpr int64_t CHUNK = 256;  // columns whose k and scores stay in the caches from one product to the next

struct Block {
  int64_t size, columns, d;  // rows, columns, width; d is a multiple of W
  T* scores;

  int64_t panels() const { return (size + PANEL - 1) / PANEL; }
  int64_t rows(int64_t p) const { return std::min(PANEL, size - p * PANEL); }
  T* at(int64_t p, int64_t column) const { return scores + (p * columns + column) * PANEL; }
  T& of(int64_t row, int64_t column) const { return at(row / PANEL, column)[row % PANEL]; }
};

struct Range { int64_t begin, end; };
Range mine(int64_t columns) {
  const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
  return {columns * thread / team, columns * (thread + 1) / team};
}

}  // namespace

// joint: scores of the rows' positives. These, and with own >= 0 column own + i of row i, take no further part.
// most, total: of each row's other scores the largest and the sum of e^(score - most), which the block then holds.
// [size] each. turned: [panels][d][PANEL], partial: [threads][panels][PANEL].
extern "C" void mi_exponentials(const T* q, const T* k, int64_t size, int64_t columns, int64_t d, const int64_t* positives,
                                int64_t own, T* scores, T* joint, T* most, T* total, int threads) {
  const Block block{size, columns, d, scores};
  const int64_t panels = block.panels();
  const Buffer turned = zeros(panels * d * PANEL), partial = buffer(threads * panels * PANEL);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    const Range range = mine(columns);
    T* const part = partial.get() + omp_get_thread_num() * panels * PANEL;
    const auto masked = [&](int64_t i, T value) {
      const int64_t column = positives[i], self = own + i;
      if (range.begin <= column && column < range.end) block.of(i, column) = value;
      if (own >= 0 && range.begin <= self && self < range.end) block.of(i, self) = value;
    };
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; p++)
      transpose(q + p * PANEL * d, d, block.rows(p), d, turned.get() + p * d * PANEL, PANEL, PANEL);
    for (int64_t c = range.begin; c < range.end; c += CHUNK)
      for (int64_t p = 0; p < panels; p++) {
        const Part whole{k + c * d, d, turned.get() + p * d * PANEL, d};
        product<false>(&whole, 1, std::min(CHUNK, range.end - c), WIDE, PANEL, block.at(p, c), PANEL,
                       [](T* at, int64_t, int, V sum) { store(at, sum); });
      }
    for (int64_t i = 0; i < size; i++) {
      const int64_t column = positives[i];
      if (range.begin <= column && column < range.end) joint[i] = block.of(i, column);
    }
    for (int64_t i = 0; i < size; i++) masked(i, -std::numeric_limits<T>::infinity());
    for (int64_t p = 0; p < panels; p++) {
      V largest[WIDE];
      UNROLL for (int v = 0; v < WIDE; v++) largest[v] = splat(std::numeric_limits<T>::lowest());
      for (int64_t c = range.begin; c < range.end; c++) {
        const T* row = block.at(p, c);
        UNROLL for (int v = 0; v < WIDE; v++) {
          const V score = load(row + v * W);
          largest[v] = score > largest[v] ? score : largest[v];
        }
      }
      UNROLL for (int v = 0; v < WIDE; v++) store(part + p * PANEL + v * W, largest[v]);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i++) {
      most[i] = partial[i];
      for (int other = 1; other < team; other++) most[i] = std::max(most[i], partial[other * panels * PANEL + i]);
    }
    for (int64_t p = 0; p < panels; p++) {
      V sum[WIDE], top[WIDE];
      T lanes[PANEL] = {};
      std::copy_n(most + p * PANEL, block.rows(p), lanes);
      UNROLL for (int v = 0; v < WIDE; v++) { sum[v] = V{}; top[v] = load(lanes + v * W); }
      for (int64_t c = range.begin; c < range.end; c++) {
        T* row = block.at(p, c);
        UNROLL for (int v = 0; v < WIDE; v++) store(row + v * W, exponential(load(row + v * W) - top[v]));
      }
      for (int64_t i = p * PANEL; i < p * PANEL + block.rows(p); i++) masked(i, 0);
      for (int64_t c = range.begin; c < range.end; c++)
        UNROLL for (int v = 0; v < WIDE; v++) sum[v] += load(block.at(p, c) + v * W);
      UNROLL for (int v = 0; v < WIDE; v++) store(part + p * PANEL + v * W, sum[v]);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < size; i++) {
      total[i] = partial[i];
      for (int other = 1; other < team; other++) total[i] += partial[other * panels * PANEL + i];
    }
  }
}

// of_rows = block k, [size][d]; of_columns += block^T weighted, [columns][d]. weighted: [size][d].
extern "C" void mi_sums(T* scores, const T* k, const T* weighted, int64_t size, int64_t columns, int64_t d, T* of_rows,
                        T* of_columns, int threads) {
  const Block block{size, columns, d, scores};
  const int64_t panels = block.panels();
  const Buffer partial = zeros(threads * size * d);
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
    const Range range = mine(columns);
    T* const part = partial.get() + omp_get_thread_num() * size * d;
    const auto add = [](T* at, int64_t, int, V sum) { store(at, load(at) + sum); };
    for (int64_t c = range.begin; c < range.end; c += CHUNK) {
      const int64_t some = std::min(CHUNK, range.end - c);
      for (int64_t f = 0; f < d; f += PANEL) {
        const int64_t vectors = std::min(PANEL, d - f) / W;
        for (int64_t p = 0; p < panels; p++) {
          const Part rows{block.at(p, c), PANEL, k + c * d + f, some};
          product<true>(&rows, 1, block.rows(p), vectors, d, part + p * PANEL * d + f, d, add);
          const Part columns{block.at(p, c), PANEL, weighted + p * PANEL * d + f, block.rows(p)};
          product<false>(&columns, 1, some, vectors, d, of_columns + c * d + f, d, add);
        }
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t x = 0; x < size * d; x++) {
      T sum = partial[x];
      for (int other = 1; other < team; other++) sum += partial[other * size * d + x];
      of_rows[x] = sum;
    }
  }
}
