// One forward or backward pass: weights are packed, stages launched, statistics finished between them.
#include <algorithm>
#include <chrono>
#include <cmath>

#include "net_work.h"
#include "patches.h"
#include "threads.h"

namespace ftso {
namespace {

int64_t tile(const Shape& s) { return std::max<int64_t>(128, (4 * s.W + kGroup - 1) / kGroup * kGroup); }
int64_t padded_image(const StemStep& s) { return (s.shape.H + 2) * (s.shape.W + 2) * s.channels; }

const float* data_or_null(const Aligned<float>& values) { return values.empty() ? nullptr : values.data(); }

// Batch statistics from sums and squares: scale = 1/sqrt(var + eps), shift = -mean * scale.
void finish_forward(const Aligned<double>& sums, double n, Aligned<double>& mean, Aligned<float>& scale,
                    Aligned<float>& shift) {
  const int64_t N = static_cast<int64_t>(mean.size());
  for (int64_t c = 0; c < N; ++c) {
    const double m = over_chunks(sums.data(), 2 * N, c) / n;
    const double variance = over_chunks(sums.data(), 2 * N, N + c) / n - m * m;
    const double r = 1 / std::sqrt(std::max(variance, 0.0) + kEps);
    mean[c] = m, scale[c] = static_cast<float>(r), shift[c] = static_cast<float>(-m * r);
  }
}

// dz = al * g + be * z + ga from the sums of g and of g * x, x the normalised value.
void finish_backward(const Aligned<double>& sums, double n, const Aligned<double>& mean, const Aligned<float>& scale,
                     Aligned<float>& al, Aligned<float>& be, Aligned<float>& ga) {
  const int64_t N = static_cast<int64_t>(mean.size());
  for (int64_t c = 0; c < N; ++c) {
    const double s = over_chunks(sums.data(), 2 * N, c) / n, q = over_chunks(sums.data(), 2 * N, N + c) / n;
    const double r = scale[c];
    al[c] = static_cast<float>(r), be[c] = static_cast<float>(-r * r * q);
    ga[c] = static_cast<float>(-r * s + r * r * mean[c] * q);
  }
}

}  // namespace

Product SkipNet::product(const Run& run, int tensor, bool with_weights) {
  if (tensor < 0) return {};
  Tensor& t = tensors_[tensor];
  Windows windows{};
  if (t.windows_of >= 0) {
    const Cell& c = cells_[t.windows_of];
    windows = {c.padded,
               c.q,
               run.at(c.highest[t.input]),
               run.at(c.processed[t.input]),
               run.at(c.d_highest[t.input]),
               run.at(c.d_processed[t.input])};
  }
  const int64_t apart = pixels(t.shape) * t.last;
  float *z = run.at(t.z), *g = run.at(t.g);
  return {t.N,
          t.w.data(),
          t.wt.data(),
          data_or_null(t.w_tiles),
          data_or_null(t.wt_tiles),
          {{0, t.last, z, g}, {t.last, t.N - t.last, z + apart, windows.C ? nullptr : g + apart}},
          t.sums.data(),
          t.al.data(),
          t.be.data(),
          t.ga.data(),
          with_weights ? t.dw.data() : nullptr,
          spec_.precision == kBf16,
          spec_.precision != kFloat32,
          windows};
}

Source SkipNet::source(const Run& run, const Cell& c, int input) {
  Tensor& t = tensors_[c.source[input]];
  const int64_t column = c.column[input];
  const bool last = column == t.last;
  const int64_t at = last ? pixels(t.shape) * t.last : column, ld = last ? t.N - t.last : t.last;
  return {run.at(t.z) + at,
          ld,
          t.scale.data() + column,
          t.shift.data() + column,
          run.wants(c.source[input]) ? run.at(t.g) + at : nullptr,
          ld,
          t.back_sums.data() + column,
          t.N};
}

// The windows of a reduction cell's input.
Source SkipNet::windows(const Run& run, const Cell& c, int input, const int (&z)[2], const int (&g)[2]) {
  Source s = source(run, c, input);
  s.z = run.at(z[input]), s.ld = s.ldg = buffers_[z[input]].columns;
  s.g = run.wants(c.source[input]) ? run.at(g[input]) : nullptr;
  return s;
}

CellStep SkipNet::cell_step(const Run& run, size_t index) {
  Cell& c = cells_[index];
  const bool last = index + 1 == cells_.size();
  CellStep s{};
  s.shape = c.out, s.K = 4 * c.padded, s.shuffle = c.shuffle();
  s.weights = run.edges[c.reduction];
  for (int i = 0; i < 2; ++i)
    (i ? s.x1 : s.x0) = c.reduction ? windows(run, c, i, c.highest, c.d_highest) : source(run, c, i);
  s.product = product(run, c.product, run.weights);
  s.strided.p = product(run, c.strided, run.weights);
  if (c.strided >= 0) {
    Tensor& t = tensors_[c.strided];
    s.strided.w2 = t.w2.data(), s.strided.wt2 = t.wt2.data();
    s.strided.w2_tiles = data_or_null(t.w2_tiles), s.strided.wt2_tiles = data_or_null(t.wt2_tiles);
    s.strided.dw2 = run.weights ? t.dw2.data() : nullptr;
    s.strided.width = t.split, s.strided.offset = t.offset;
  }
  s.pooled = last ? run.pooled : nullptr;
  s.d_pooled = last ? run.d_pooled : nullptr;
  s.dots = run.dots ? run.dots + index * kChunks * kDots : nullptr;
  return s;
}

ReducePaths SkipNet::reduce_paths(const Run& run, Cell& c) {
  ReducePaths r{};
  r.shape = c.out, r.q = c.q, r.F = c.F, r.X = c.X;
  for (int i = 0; i < 2; ++i) {
    r.x[i] = windows(run, c, i, c.processed, c.d_processed);
    r.w[i] = c.w[i].data(), r.wt[i] = c.wt[i].data();
    r.dw[i] = run.weights ? c.dw[i].data() : nullptr;
  }
  r.f = run.at(c.f), r.sums = c.sums.data();
  r.d_nodes = run.at(c.d_nodes);
  r.weights = run.edges[1], r.al = c.al.data(), r.be = c.be.data(), r.ga = c.ga.data();
  return r;
}

ReduceStep SkipNet::reduce_step(const Run& run, size_t index) {
  Cell& c = cells_[index];
  ReduceStep r{};
  r.cell = cell_step(run, index);
  r.q = c.q, r.F = c.F;
  r.f = run.at(c.f), r.scale = c.scale.data(), r.shift = c.shift.data();
  r.f_sums = c.back_sums.data(), r.d_nodes = run.at(c.d_nodes);
  return r;
}

StemStep SkipNet::stem_step(const Run& run) {
  StemStep s{};
  s.shape = {spec_.B, spec_.H, spec_.W};
  s.channels = spec_.in_channels, s.K = 9 * spec_.in_channels, s.S = stem_padded_;
  s.images = run.images, s.w = stem_w_.data(), s.w_tiles = data_or_null(stem_w_tiles_);
  s.scale = stem_scale_.data(), s.shift = stem_shift_.data();
  s.covariance = patches_.data(), s.product = product(run, 0, run.weights);
  s.sums = stem_sums_.data(), s.dw = stem_dw_.data();
  return s;
}

template <typename Step>
void SkipNet::launch(const char* name, const char* (*kernel)(const Step&, int64_t, float*), const Step& step, Work work,
                     int64_t scratch, int threads) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const char* ran[kChunks];
  over_chunks_of_work(kChunks + static_cast<int64_t>(later_.size()), threads, [&](int64_t i) {
    if (i < kChunks)
      ran[i] = kernel(step, i, thread_scratch(scratch));
    else
      later_[i - kChunks].add();
  });
  later_.clear();
  launches_.push_back({name, ran[0], std::chrono::duration<double>(Clock::now() - start).count(), work});
}

int64_t SkipNet::cell_scratch(const CellStep& c) const {
  const int64_t T = tile(c.shape), N = c.product.N + c.strided.p.N;
  const int64_t width = c.strided.width;
  const int64_t tiles = std::max({tile_stream_floats(c.K, c.product.N) + strided_tiles_floats(T, c.K, width),
                                  tile_stream_floats(c.product.N, c.K) + strided_tiles_floats(T, width, c.K),
                                  outer_tiles_floats(T, c.K, std::max(c.product.N, width))});
  return 4 * c.K + T * (2 * c.K + 2 * N) + 8 * kLanes + tiles;
}

void SkipNet::finish_stem(const float* const* weights) {
  const int64_t K = 9 * spec_.in_channels, ld = padded(K + 1);
  const double n = static_cast<double>(spec_.B * spec_.H * spec_.W);
  covariance_of(patches_.data(), spec_.in_channels, ld, covariance_.data());
  for (int64_t o = 0; o < stem_; ++o) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < K; ++i) {
      const double w = stem_w_[i * stem_padded_ + o];
      mean += w * covariance_[i * ld + K];
      for (int64_t j = 0; j < K; ++j) square += w * stem_w_[j * stem_padded_ + o] * covariance_[i * ld + j];
    }
    mean /= n;
    const double variance = square / n - mean * mean;  // no number where patches are beyond float32: without bound
    const double r = std::isfinite(variance) ? 1 / std::sqrt(std::max(variance, 0.0) + kEps) : 0;
    const double scale = r * weights[1][o];
    stem_mean_[o] = mean, stem_rstd_[o] = r;
    stem_scale_[o] = static_cast<float>(scale), stem_shift_[o] = static_cast<float>(weights[2][o] - mean * scale);
  }
}

const char* SkipNet::forward(float* memory, bool with_weights, const float* images, const float* const* weights,
                             const float* edges_normal, const float* edges_reduce, float* logits, int threads) {
  const Kernels& isa = kernels();
  const Run run{memory,         &plan(with_weights).offsets,
                images,         {edges_normal, edges_reduce},
                pooled_.data(), nullptr,
                nullptr,        with_weights,
                false};
  pack_all(weights, threads);
  const auto clear = [](Aligned<double>& sums) { std::fill(sums.begin(), sums.end(), 0.0); };
  const auto finish = [&](int tensor) {
    if (tensor < 0) return;
    Tensor& t = tensors_[tensor];
    finish_forward(t.sums, static_cast<double>(pixels(t.shape)), t.mean, t.scale, t.shift);
  };
  for (Tensor& t : tensors_) clear(t.sums);
  for (Cell& c : cells_) clear(c.sums);

  const StemStep stem = stem_step(run);
  launch("stem_covariance", isa.stem_covariance, stem, work_of_covariance(stem),
         (stem.channels + 1) * (spec_.H + 2) * (padded(spec_.W) + kLanes) + kLanes, threads);
  finish_stem(weights);
  launch("stem_fwd", isa.stem_fwd, stem, work_of(stem, false),
         tile(stem.shape) * 2 * stem.S + spec_.W * stem.product.N + padded_image(stem), threads);
  finish(0);
  for (size_t i = 0; i < cells_.size(); ++i) {
    Cell& c = cells_[i];
    if (c.reduction) {
      const ReducePaths paths = reduce_paths(run, c);
      launch("reduce_paths_fwd", isa.reduce_paths_fwd, paths, work_of(paths, false), tile(c.out) * 2 * c.q + kLanes,
             threads);
      finish_forward(c.sums, static_cast<double>(pixels(c.out)), c.mean, c.scale, c.shift);
      const ReduceStep step = reduce_step(run, i);
      launch("reduce_fwd", isa.reduce_fwd, step, work_of(step, false), cell_scratch(step.cell), threads);
    } else {
      const CellStep step = cell_step(run, i);
      launch("cell_fwd", isa.cell_fwd, step, work_of(step, false), cell_scratch(step), threads);
    }
    finish(c.product), finish(c.strided);
  }
  classify(weights, logits, threads);
  return launches_.front().isa;
}

const char* SkipNet::backward(float* memory, const float* images, const float* const* weights,
                              const float* edges_normal, const float* edges_reduce, const float* d_logits,
                              float* d_edges_normal, float* d_edges_reduce, float* const* d_weights, int threads) {
  const Kernels& isa = kernels();
  std::fill(dots_.begin(), dots_.end(), 0.0);
  unclassify(weights, d_logits, d_weights, threads);
  const bool with_weights = d_weights != nullptr, with_edges = d_edges_normal || d_edges_reduce;
  const Run run{memory,
                &plan(with_weights).offsets,
                images,
                {edges_normal, edges_reduce},
                nullptr,
                d_pooled_.data(),
                with_edges ? dots_.data() : nullptr,
                with_weights,
                true};
  const auto clear = [](auto& values) { std::fill(values.begin(), values.end(), 0); };
  for (Tensor& t : tensors_) clear(t.back_sums);
  for (Cell& c : cells_) clear(c.back_sums);
  clear(stem_sums_);
  const auto finish = [&](int tensor) {
    if (tensor < 0) return;
    Tensor& t = tensors_[tensor];
    finish_backward(t.back_sums, static_cast<double>(pixels(t.shape)), t.mean, t.scale, t.al, t.be, t.ga);
  };
  const auto add_weights_of = [&](int tensor) {
    if (!with_weights || tensor < 0) return;
    add_later(tensors_[tensor].dw);
    if (tensors_[tensor].strided) add_later(tensors_[tensor].dw2);
  };
  for (size_t i = cells_.size(); i-- > 0;) {
    Cell& c = cells_[i];
    finish(c.product), finish(c.strided);
    if (c.reduction) {
      const ReduceStep step = reduce_step(run, i);
      launch("reduce_bwd", isa.reduce_bwd, step, work_of(step, true), cell_scratch(step.cell) + kNodeSums * padded(c.q),
             threads);
      finish_backward(c.back_sums, static_cast<double>(pixels(c.out)), c.mean, c.scale, c.al, c.be, c.ga);
      const ReducePaths paths = reduce_paths(run, c);
      const int64_t scratch = 2 * (c.X + c.F) + tile(c.out) * (2 * c.q + c.F + c.X) + kLanes;
      add_weights_of(c.product), add_weights_of(c.strided);
      launch("reduce_paths_bwd", isa.reduce_paths_bwd, paths, work_of(paths, true), scratch, threads);
      for (auto& dw : c.dw)
        if (with_weights) add_later(dw);
    } else {
      const CellStep step = cell_step(run, i);
      launch("cell_bwd", isa.cell_bwd, step, work_of(step, true), cell_scratch(step), threads);
      add_weights_of(c.product), add_weights_of(c.strided);
    }
  }
  if (with_weights) {
    finish(0);
    const StemStep stem = stem_step(run);
    launch("stem_bwd", isa.stem_bwd, stem, work_of(stem, true),
           tile(stem.shape) * 2 * (stem.S + stem.product.N) + padded_image(stem), threads);
    add_weights_of(0);
    unpack_all(weights, d_weights, threads);
  }
  float* const d_edges[2] = {d_edges_normal, d_edges_reduce};
  for (int type = 0; type < 2; ++type)
    for (int e = 0; d_edges[type] && e < kEdges; ++e) {
      double total = 0;
      for (size_t i = 0; i < cells_.size(); ++i)
        if (cells_[i].reduction == (type == 1)) total += over_chunks(dots_.data() + i * kChunks * kDots, kDots, e);
      d_edges[type][e] = static_cast<float>(total);
    }
  return launches_.front().isa;
}

std::vector<double> SkipNet::input_sums(int64_t cell, int input) const {
  const Cell& c = cells_.at(cell);
  const Tensor& t = tensors_[c.source[input]];
  std::vector<double> found;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t i = 0; i < c.C; ++i)
      found.push_back(over_chunks(t.back_sums.data(), 2 * t.N, half * t.N + c.column[input] + i));
  return found;
}

}  // namespace ftso
