// Weights into the products' layout before a pass, and their gradients out of it afterwards.
#include <algorithm>
#include <cstring>

#include "skip_net.h"
#include "threads.h"

namespace ftso {

// move(activation row k, output row o) for one part of a product, in squares: one side is the other's transpose.
template <typename Move>
static void every_weight(int64_t groups, int64_t width, int64_t rows, Move move) {
  for (int64_t first = 0; first < rows; first += kLanes)
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < width; ++c)
        for (int64_t o = first; o < std::min(rows, first + kLanes); ++o)
          move(g * padded(width) + c, o, (o * groups + g) * width + c);
}

// Puts a weight into a product's right operand [rows][ld]: as a float, or rounded into the pair of its row.
static void place(float* w, int64_t ld, int64_t row, int64_t column, float value, bool pairs) {
  if (!pairs) {
    w[row * ld + column] = value;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t rounded = static_cast<uint16_t>(bf16_bits(bits));
  std::memcpy(reinterpret_cast<char*>(w + row / 2 * ld + column) + row % 2 * 2, &rounded, sizeof rounded);
}

void SkipNet::pack(Tensor& t, const float* const* weights) {
  const bool forward = spec_.precision == kBf16, backward = spec_.precision != kFloat32;
  const auto put = [&](Aligned<float>& w, Aligned<float>& wt, int64_t k, int64_t column, float value) {
    place(w.data(), t.strided ? t.split : t.N, k, column, value, forward);
    place(wt.data(), t.K, column, k, value, backward);
  };
  if (!t.strided) {
    for (const Part& p : t.parts)
      every_weight(t.groups, t.width, p.rows, [&](int64_t k, int64_t o, int64_t from) {
        put(t.w, t.wt, k, p.column + o, weights[p.weight][from]);
      });
    split_all(t);
    return;
  }
  const int64_t second = t.offset ? 0 : t.half;  // where the second half's columns start in w2
  every_weight(t.groups, t.width, t.half, [&](int64_t k, int64_t o, int64_t from) {
    put(t.w, t.wt, k, o, weights[t.parts[0].weight][from]);
    put(t.w2, t.wt2, k, second + o, weights[t.parts[0].weight + 1][from]);
  });
  split_all(t);
}

// w [K][N] for the tile unit where there is one; else nothing.
static void split(bool wanted, const Aligned<float>& w, int64_t K, int64_t N, Aligned<float>& tiles) {
  tiles.resize(wanted && kernels().split ? thirds_floats(K, N) : 0);
  if (!tiles.empty()) kernels().split(w.data(), K, N, tiles.data());
}

// Where floats are multiplied: a FactorizedReduce's only if its halves are whole vectors.
void SkipNet::split_all(Tensor& t) const {
  const int64_t N = t.strided ? t.split : t.N;
  const bool whole = !t.strided || t.offset;
  const bool forward = whole && spec_.precision != kBf16, backward = whole && spec_.precision == kFloat32;
  split(forward, t.w, t.K, N, t.w_tiles), split(forward && t.strided, t.w2, t.K, N, t.w2_tiles);
  split(backward, t.wt, N, t.K, t.wt_tiles), split(backward && t.strided, t.wt2, N, t.K, t.wt2_tiles);
}

static constexpr int64_t kSummed = 4096;  // values of a partial at a time: a tenth of a millisecond

// Chunks come from memory: the next is asked for ahead.
void SkipNet::Sum::add() const {
  constexpr int64_t kBlock = 512;
  const int64_t n = static_cast<int64_t>(partial->size()) / kChunks;
  double total[kBlock];
  for (int64_t at = first; at < first + size; at += kBlock) {
    const int64_t block = std::min(kBlock, first + size - at);
    std::fill(total, total + block, 0.0);
    for (int64_t c = 0; c < kChunks; ++c) {
      const float* chunk = partial->data() + c * n + at;
      const float* next = c + 1 < kChunks ? chunk + n : partial->data() + at + block;
      for (int64_t i = 0; i < block; i += kLanes) __builtin_prefetch(next + i);
      for (int64_t i = 0; i < block; ++i) total[i] += chunk[i];
    }
    for (int64_t i = 0; i < block; ++i) (*partial)[at + i] = static_cast<float>(total[i]);
  }
}

void SkipNet::add_later(Partials<float>& partial) {
  const int64_t n = static_cast<int64_t>(partial.size()) / kChunks;
  for (int64_t first = 0; first < n; first += kSummed)
    later_.push_back({&partial, first, std::min(kSummed, n - first)});
}

void SkipNet::add_now(int threads) {
  over_chunks_of_work(static_cast<int64_t>(later_.size()), threads, [&](int64_t i) { later_[i].add(); });
  later_.clear();
}

void SkipNet::unpack(const Tensor& t, float* const* d_weights) const {
  if (!t.strided) {
    for (const Part& p : t.parts)
      every_weight(t.groups, t.width, p.rows, [&](int64_t k, int64_t o, int64_t into) {
        d_weights[p.weight][into] = t.dw[k * t.N + p.column + o];
      });
    return;
  }
  const int64_t second = t.offset ? 0 : t.half;
  every_weight(t.groups, t.width, t.half, [&](int64_t k, int64_t o, int64_t into) {
    d_weights[t.parts[0].weight][into] = t.dw[k * t.split + o];
    d_weights[t.parts[0].weight + 1][into] = t.dw2[k * t.split + second + o];
  });
}

// Edge (node j, input) has two weights [q/2][q]: output halves from the pixels (even, even) and (odd, odd).
template <typename Move>
static void every_path_weight(int64_t q, int64_t first, Move move) {
  for (int64_t node = 0; node < 4; ++node)
    for (int64_t input = 0; input < 2; ++input)
      for (int64_t side = 0; side < 2; ++side)
        for (int64_t o = 0; o < q / 2; ++o)
          for (int64_t c = 0; c < q; ++c)
            move(input, side * q + c, node * q + side * (q / 2) + o, first + (node * 2 + input) * 2 + side, o * q + c);
}

// Stem weights [out][in][3][3] against rows (y, x, in).
template <typename Move>
static void every_stem_weight(int64_t out, int64_t in, Move move) {
  for (int64_t o = 0; o < out; ++o)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t yx = 0; yx < 9; ++yx) move(yx * in + i, o, (o * in + i) * 9 + yx);
}

// work(i) for tensors and cells, the last tensors first: the largest of them is a third of it all.
template <typename Tensors, typename Cells, typename OfTensor, typename OfCell>
static void for_all(Tensors& tensors, Cells& cells, int threads, OfTensor of_tensor, OfCell of_cell) {
  const int64_t n = static_cast<int64_t>(tensors.size()), m = static_cast<int64_t>(cells.size());
  over_chunks_of_work(n + m, threads, [&](int64_t i) {
    if (i < n)
      of_tensor(tensors[n - 1 - i]);
    else if (cells[i - n].reduction)
      of_cell(cells[i - n]);
  });
}

void SkipNet::pack_all(const float* const* weights, int threads) {
  every_stem_weight(stem_, spec_.in_channels,
                    [&](int64_t k, int64_t o, int64_t from) { stem_w_[k * stem_padded_ + o] = weights[0][from]; });
  split(spec_.precision != kBf16, stem_w_, 9 * spec_.in_channels, stem_padded_, stem_w_tiles_);
  for_all(
      tensors_, cells_, threads, [&](Tensor& t) { pack(t, weights); },
      [&](Cell& c) {
        every_path_weight(c.q, c.weight, [&](int64_t input, int64_t k, int64_t column, int64_t index, int64_t from) {
          c.w[input][k * c.F + column] = c.wt[input][column * c.X + k] = weights[index][from];
        });
      });
}

void SkipNet::unpack_all(const float* const* weights, float* const* d_weights, int threads) {
  add_now(threads);
  for_all(
      tensors_, cells_, threads, [&](Tensor& t) { unpack(t, d_weights); },
      [&](Cell& c) {
        every_path_weight(c.q, c.weight, [&](int64_t input, int64_t k, int64_t column, int64_t index, int64_t into) {
          d_weights[index][into] = c.dw[input][k * c.F + column];
        });
      });
  unpack_stem(weights, d_weights);
}

void SkipNet::unpack_stem(const float* const* weights, float* const* d_weights) const {
  // Behind the stem's batch norm: dW = gamma r (U - mean(d) sum(patch) - mean(d xhat) sum(patch xhat)), both sums from
  // the patches' covariance.
  const int64_t K = 9 * spec_.in_channels, ld = padded(K + 1);
  const double n = static_cast<double>(spec_.B * spec_.H * spec_.W);
  for (int64_t o = 0; o < stem_; ++o) {
    const double mean = stem_mean_[o], r = stem_rstd_[o];
    const double s = over_chunks(stem_sums_.data(), 2 * stem_padded_, o);
    const double q = (over_chunks(stem_sums_.data(), 2 * stem_padded_, stem_padded_ + o) - mean * s) * r;
    d_weights[1][o] = static_cast<float>(q), d_weights[2][o] = static_cast<float>(s);
    every_stem_weight(1, spec_.in_channels, [&](int64_t k, int64_t, int64_t into) {
      double response = 0;
      for (int64_t j = 0; j < K; ++j) response += covariance_[k * ld + j] * stem_w_[j * stem_padded_ + o];
      const double patch = covariance_[k * ld + K], with_x = (response - patch * mean) * r;
      const double u = over_chunks(stem_dw_.data(), K * stem_padded_, k * stem_padded_ + o);
      d_weights[0][o * K + into] = static_cast<float>(weights[1][o] * r * (u - s / n * patch - q / n * with_x));
    });
  }
}

}  // namespace ftso
