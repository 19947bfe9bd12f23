// Which tensors, in which memory, from which stage to which: everything that a shape decides.
#include <algorithm>

#include "patches.h"
#include "skip_net.h"

namespace ftso {
namespace {

constexpr int64_t kSlack = 256;  // floats behind a buffer: vectors may read past its end

Shape halved(const Shape& s) { return {s.B, s.H / 2, s.W / 2}; }
}  // namespace

SkipNet::SkipNet(const Spec& spec) : spec_(spec) {
  stem_ = 3 * spec.channels, stem_padded_ = padded(stem_);
  Shape shape{spec.B, spec.H, spec.W};
  int64_t C = spec.channels, stage = 2;
  n_weights_ = 3;
  std::vector<int64_t> before(spec.cells), after(spec.cells);  // weight index of preprocess0, preprocess1
  for (int64_t i = 0; i < spec.cells; ++i) {
    Cell cell{};
    cell.reduction = i == spec.cells / 3 || i == 2 * spec.cells / 3;
    if (cell.reduction) C *= 2;
    cell.C = C, cell.padded = padded(C);
    cell.in = shape;
    cell.out = cell.reduction ? halved(shape) : shape;
    shape = cell.out;
    before[i] = n_weights_;
    n_weights_ += i > 0 && cells_[i - 1].reduction ? 2 : 1;
    after[i] = n_weights_++;
    cell.stage = stage;
    stage += 1 + cell.reduction;
    const int64_t V = cell.padded / kLanes, group = C / spec.k;
    cell.to.resize(C);
    cell.fwd.assign(V * V * kLanes, -1), cell.bwd.assign(V * V * kLanes, -1);
    for (int64_t c = 0; c < C; ++c) {
      const int64_t to = (c % group) * spec.k + c / group;
      cell.to[c] = static_cast<int32_t>(to);
      cell.fwd[(to / kLanes * V + c / kLanes) * kLanes + to % kLanes] = static_cast<int32_t>(c % kLanes);
      cell.bwd[(c / kLanes * V + to / kLanes) * kLanes + c % kLanes] = static_cast<int32_t>(to % kLanes);
    }
    if (cell.reduction) {
      cell.q = group, cell.F = padded(4 * group), cell.X = padded(2 * group);
      cell.weight = n_weights_;
      n_weights_ += 16;
      for (int input = 0; input < 2; ++input) {
        cell.w[input].assign(2 * group * cell.F, 0), cell.wt[input].assign(cell.F * cell.X, 0);
        cell.dw[input].resize(kChunks * 2 * group * cell.F);
      }
      for (auto* v : {&cell.scale, &cell.shift, &cell.al, &cell.be, &cell.ga}) v->assign(2 * cell.F + kLanes, 0);
      cell.mean.assign(2 * cell.F, 0);
      cell.sums.assign(kChunks * 4 * cell.F, 0), cell.back_sums.assign(kChunks * 4 * cell.F, 0);
    }
    cells_.push_back(std::move(cell));
  }
  n_stages_ = stage;
  n_weights_ += 2;  // the classifier's
  pooled_.assign(spec.B * 4 * cells_.back().padded, 0), d_pooled_ = pooled_;

  const auto add_tensor = [&](const Shape& s, int64_t groups, int64_t width) {
    Tensor t;
    t.shape = s, t.groups = groups, t.width = width, t.K = groups * padded(width);
    tensors_.push_back(std::move(t));
    return static_cast<int>(tensors_.size() - 1);
  };
  const auto add_part = [&](int tensor, int64_t weight, int64_t cell, int input) {
    Tensor& t = tensors_[tensor];
    cells_[cell].source[input] = tensor, cells_[cell].column[input] = static_cast<int>(t.N);
    if (cells_[cell].reduction) t.windows_of = static_cast<int>(cell), t.input = input;
    t.parts.push_back({weight, cells_[cell].C, t.N});
    t.last = t.N, t.N += cells_[cell].padded;
  };
  const int stem = add_tensor({spec.B, spec.H, spec.W}, 1, stem_);
  add_part(stem, before[0], 0, 0), add_part(stem, after[0], 0, 1), add_part(stem, before[1], 1, 0);
  for (int64_t i = 0; i + 1 < spec.cells; ++i) {
    const int product = cells_[i].product = add_tensor(cells_[i].out, 4, cells_[i].C);
    add_part(product, after[i + 1], i + 1, 1);
    if (i + 2 >= spec.cells) continue;
    if (!cells_[i + 1].reduction) {
      add_part(product, before[i + 2], i + 2, 0);
      continue;
    }
    const int strided = cells_[i].strided = add_tensor(halved(cells_[i].out), 4, cells_[i].C);
    add_part(strided, before[i + 2], i + 2, 0);
    Tensor& t = tensors_[strided];
    t.strided = true, t.half = cells_[i + 2].C / 2;
    t.offset = t.half % kLanes ? 0 : t.half;
    t.split = t.offset ? t.half : t.N;
  }
  for (Tensor& t : tensors_) {
    const int64_t width = t.strided ? t.split : t.N;
    for (auto* v : {&t.w, &t.wt}) v->assign(t.K * width, 0);
    t.dw.resize(kChunks * t.K * width);
    if (t.strided) t.w2.assign(t.K * width, 0), t.wt2.assign(t.K * width, 0), t.dw2.resize(kChunks * t.K * width);
    for (auto* v : {&t.scale, &t.shift, &t.al, &t.be, &t.ga}) v->assign(t.N, 0);
    t.mean.assign(t.N, 0);
    t.sums.assign(kChunks * 2 * t.N, 0), t.back_sums.assign(kChunks * 2 * t.N, 0);
  }

  // A buffer lives from the stage that writes it to the last that reads it; stage s runs backward at back(s).
  const auto back = [&](int64_t s) { return 2 * n_stages_ - 1 - s; };
  const auto buffer = [&](const Shape& s, int64_t columns, int64_t first, int64_t last) {
    buffers_.push_back({pixels(s), columns, first, last});
    return static_cast<int>(buffers_.size() - 1);
  };
  std::vector<int64_t> producer(tensors_.size(), 1), reader(tensors_.size(), 0);
  for (const Cell& c : cells_) {
    for (int t : {c.product, c.strided})
      if (t >= 0) producer[t] = c.stage + c.reduction;
    for (int t : c.source) reader[t] = std::max(reader[t], c.stage);
  }
  for (size_t i = 0; i < tensors_.size(); ++i) {
    Tensor& t = tensors_[i];
    t.z = buffer(t.shape, t.N, producer[i], back(producer[i]));
    if (const int64_t columns = t.windows_of < 0 ? t.N : t.last)
      t.g = buffer(t.shape, columns, back(reader[i]), back(producer[i]));
  }
  for (size_t i = 0; i < cells_.size(); ++i) {
    Cell& c = cells_[i];
    if (!c.reduction) continue;
    const int64_t paths = c.stage, nodes = c.stage + 1;
    c.f = buffer(c.out, 2 * c.F, paths, back(paths));
    c.d_nodes = buffer(c.out, c.F, back(nodes), back(paths));
    for (int input = 0; input < 2; ++input) {
      const int64_t written = producer[c.source[input]];
      c.highest[input] = buffer(c.out, c.padded, written, back(nodes));
      c.processed[input] = buffer(c.out, 2 * c.q, written, back(paths));
      c.d_highest[input] = buffer(c.out, c.padded, back(nodes), back(written));
      c.d_processed[input] = buffer(c.out, 2 * c.q, back(paths), back(written));
    }
  }
  const int64_t in = spec.in_channels;
  patches_.resize(kChunks * kPatchSums * in * (in + 1)), covariance_.resize(9 * in * padded(9 * in + 1));
  dots_.assign(spec.cells * kChunks * kDots, 0);
  for (auto* v : {&stem_mean_, &stem_rstd_}) v->assign(stem_padded_, 0);
  stem_sums_.assign(kChunks * 2 * stem_padded_, 0);
  stem_w_.assign(9 * spec.in_channels * stem_padded_, 0);
  stem_dw_.resize(kChunks * 9 * spec.in_channels * stem_padded_);
  stem_scale_.assign(stem_padded_, 0), stem_shift_.assign(stem_padded_, 0);
  with_weights_ = make_plan(true), betas_only_ = make_plan(false);
}

int64_t SkipNet::saved_floats() const {
  int64_t total = 0;
  for (const Buffer& b : buffers_)
    if (b.first < n_stages_ && b.last >= n_stages_) total += b.rows * b.columns;
  return total;
}

// First fit, larger buffers first: the lowest place that no buffer alive at the same time holds.
SkipNet::Plan SkipNet::make_plan(bool weights) const {
  Plan plan;
  plan.offsets.assign(buffers_.size(), 0);
  std::vector<size_t> order, placed;
  for (size_t i = 0; i < buffers_.size(); ++i)
    if (weights || static_cast<int>(i) != tensors_[0].g) order.push_back(i);
  const auto size = [&](size_t i) { return padded(buffers_[i].rows * buffers_[i].columns + kSlack); };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) > size(b); });
  for (size_t i : order) {
    std::vector<size_t> rivals;
    for (size_t j : placed)
      if (buffers_[j].first <= buffers_[i].last && buffers_[i].first <= buffers_[j].last) rivals.push_back(j);
    std::sort(rivals.begin(), rivals.end(), [&](size_t a, size_t b) { return plan.offsets[a] < plan.offsets[b]; });
    int64_t at = 0;
    for (size_t j : rivals) {
      if (at + size(i) <= plan.offsets[j]) break;
      at = std::max(at, plan.offsets[j] + size(j));
    }
    plan.offsets[i] = at;
    plan.floats = std::max(plan.floats, at + size(i));
    placed.push_back(i);
  }
  return plan;
}

}  // namespace ftso
