// The classifier behind the mean over the image, summed in double in one order.
#include <algorithm>
#include <vector>

#include "skip_net.h"
#include "threads.h"

namespace ftso {

// logits = pooled W' + b
void SkipNet::classify(const float* const* weights, float* logits, int threads) const {
  const int64_t C = cells_.back().C, stride = cells_.back().padded, n = spec_.classes;
  const float *w = weights[n_weights_ - 2], *bias = weights[n_weights_ - 1];
  std::vector<double> columns(4 * C * n);  // W'
  for (int64_t o = 0; o < n; ++o)
    for (int64_t k = 0; k < 4 * C; ++k) columns[k * n + o] = w[o * 4 * C + k];
  over_chunks_of_work(kChunks, threads, [&](int64_t chunk) {
    std::vector<double> row(n);
    for (int64_t b = spec_.B * chunk / kChunks; b < spec_.B * (chunk + 1) / kChunks; ++b) {
      std::copy(bias, bias + n, row.begin());
      for (int64_t g = 0; g < 4; ++g)
        for (int64_t c = 0; c < C; ++c) {
          const double x = pooled_[(b * 4 + g) * stride + c], *column = columns.data() + (g * C + c) * n;
          for (int64_t o = 0; o < n; ++o) row[o] += x * column[o];
        }
      for (int64_t o = 0; o < n; ++o) logits[b * n + o] = static_cast<float>(row[o]);
    }
  });
}

void SkipNet::unclassify(const float* const* weights, const float* d_logits, float* const* d_weights, int threads) {
  const int64_t C = cells_.back().C, stride = cells_.back().padded, n = spec_.classes;
  const float* w = weights[n_weights_ - 2];
  over_chunks_of_work(kChunks, threads, [&](int64_t chunk) {
    std::vector<double> row(4 * C);
    for (int64_t b = spec_.B * chunk / kChunks; b < spec_.B * (chunk + 1) / kChunks; ++b) {
      std::fill(row.begin(), row.end(), 0.0);
      for (int64_t o = 0; o < n; ++o)
        for (int64_t k = 0; k < 4 * C; ++k) row[k] += static_cast<double>(d_logits[b * n + o]) * w[o * 4 * C + k];
      for (int64_t g = 0; g < 4; ++g)
        for (int64_t c = 0; c < C; ++c) d_pooled_[(b * 4 + g) * stride + c] = static_cast<float>(row[g * C + c]);
    }
  });
  over_chunks_of_work(d_weights ? n : 0, threads, [&](int64_t o) {
    std::vector<double> row(4 * C);
    double total = 0;
    for (int64_t b = 0; b < spec_.B; ++b) {
      const double d = d_logits[b * n + o];
      total += d;
      for (int64_t g = 0; g < 4; ++g)
        for (int64_t c = 0; c < C; ++c) row[g * C + c] += d * pooled_[(b * 4 + g) * stride + c];
    }
    for (int64_t k = 0; k < 4 * C; ++k) d_weights[n_weights_ - 2][o * 4 * C + k] = static_cast<float>(row[k]);
    d_weights[n_weights_ - 1][o] = static_cast<float>(total);
  });
}

}  // namespace ftso
