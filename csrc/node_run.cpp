// The passes of a mixed node: launches over the chunks of images, and between them the batch norms' sums are finished.
#include <algorithm>
#include <cmath>
#include <utility>

#include "aligned.h"
#include "chunks.h"
#include "node.h"
#include "threads.h"

namespace ftso {
namespace {

// Partial gradients of n weights: added up chunk after chunk in double, the weights shared out to the threads. al: of
// each row of `columns`, what the partial gradients are without; null: 1.
struct Partial {
  const float* chunks;
  int64_t n;
  float* out;
  const float* al = nullptr;
  int64_t columns = 1;
};
void add_up(const std::vector<Partial>& partials, int threads) {
  constexpr int64_t kPiece = 1024;
  std::vector<std::pair<const Partial*, int64_t>> pieces;
  for (const Partial& p : partials)
    for (int64_t first = 0; first < p.n; first += kPiece) pieces.emplace_back(&p, first);
  over_chunks_of_work(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
    const auto [p, first] = pieces[i];
    const int64_t n = std::min(kPiece, p->n - first);
    double total[kPiece] = {};
    for (int chunk = 0; chunk < kChunks; ++chunk)
      for (int64_t j = 0; j < n; ++j) total[j] += p->chunks[chunk * p->n + first + j];
    for (int64_t j = 0; j < n; ++j)
      p->out[first + j] = static_cast<float>(p->al ? p->al[(first + j) / p->columns] * total[j] : total[j]);
  });
}

const float* transposed(const float* w, const float* al, int64_t rows, int64_t columns, Room& room) {
  float* found = room.take<float>(rows * columns);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) found[c * rows + r] = al[r] * w[r * columns + c];
  return found;
}

}  // namespace

// The steps of one launch; each chunk goes through all of them on one thread. A launch begins where the one before
// ended: what that left in the caches is used before it is displaced.
struct Node::Steps {
  std::vector<BlockStep> blocks;
  std::vector<PoolStep> pools;
  std::vector<MixStep> mixes;

  const char* launch(bool backward, bool from_last, int threads) const {
    const Kernels& isa = kernels();
    int64_t floats = 0;
    for (const BlockStep& s : blocks) floats = std::max(floats, block_scratch(s));
    for (const PoolStep& s : pools) floats = std::max(floats, pool_scratch(s));
    for (const MixStep& s : mixes) floats = std::max(floats, mix_scratch(s));
    const char* ran = isa.isa;
    over_chunks_of_work(kChunks, threads, [&](int64_t i) {
      const int64_t chunk = from_last ? kChunks - 1 - i : i;
      float* scratch = thread_scratch(floats);
      const char* name = ran;
      for (const PoolStep& s : pools) name = (backward ? isa.pools_bwd : isa.pools_fwd)(s, chunk, scratch);
      for (const BlockStep& s : blocks) name = (backward ? isa.block_bwd : isa.block_fwd)(s, chunk, scratch);
      for (const MixStep& s : mixes) name = (backward ? isa.mix_bwd : isa.mix_fwd)(s, chunk, scratch);
      if (chunk == 0) ran = name;
    });
    return ran;
  }
};

// What is known of every batch norm during a pass.
struct Node::Coefficients {
  struct Of {
    double* sums;  // a chunk's row: of y and its squares forward, of the gradient and its dots backward
    float *center, *scale, *shift, *al, *be, *ga;
  };
  const Node& node;
  const Call& call;
  Room room;
  std::vector<Of> of;

  Coefficients(const Node& n, const Call& c) : node(n), call(c), of(n.norms_.size()) {
    for (size_t i = 0; i < of.size(); ++i) {
      const int64_t C = n.norms_[i].channels;
      of[i].sums = room.take<double>(kChunks * 2 * C);
      for (auto* v : {&of[i].center, &of[i].scale, &of[i].shift, &of[i].al, &of[i].be, &of[i].ga})
        *v = room.take<float>(C);
    }
  }
  double gamma(size_t i, int64_t c) const { return call.affine.empty() ? 1 : call.affine[2 * i][c]; }
  double bias(size_t i, int64_t c) const { return call.affine.empty() ? 0 : call.affine[2 * i + 1][c]; }
  // The sums of a norm's first row and of its second.
  double first(size_t i, int64_t c) const { return over_chunks(of[i].sums, 2 * node.norms_[i].channels, c); }
  double second(size_t i, int64_t c) const { return first(i, node.norms_[i].channels + c); }

  // Forward: mean and 1/deviation from the sums, each kept as two floats that add up to it.
  void finish(size_t i) {
    const Norm& n = node.norms_[i];
    float* kept = call.saved + n.statistics;
    const auto keep = [&](double value, float* at) {
      at[0] = static_cast<float>(value), at[n.channels] = static_cast<float>(value - at[0]);
    };
    for (int64_t c = 0; c < n.channels; ++c) {
      const double mean = first(i, c) / node.count(), variance = second(i, c) / node.count() - mean * mean;
      keep(mean, kept + c), keep(1 / std::sqrt(std::max(variance, 0.0) + kEps), kept + 2 * n.channels + c);
    }
    // what rounding up leaves free is written too: equal calls leave equal bytes
    const int64_t end = n.statistics + rounded_up(4 * n.channels, kLanes);
    for (int64_t p = n.raw + node.spec_.B * n.channels * node.pixels(); p < n.statistics; ++p) call.saved[p] = 0;
    for (int64_t p = n.statistics + 4 * n.channels; p < end; ++p) call.saved[p] = 0;
    load(i);
  }
  double kept(size_t i, int64_t at) const {
    const float* pair = call.saved + node.norms_[i].statistics + at;
    return static_cast<double>(pair[0]) + pair[node.norms_[i].channels];
  }
  double mean(size_t i, int64_t c) const { return kept(i, c); }
  double scale(size_t i, int64_t c) const { return kept(i, 2 * node.norms_[i].channels + c); }  // 1/deviation
  // Behind the affine part y is y * scale + shift.
  void load(size_t i) {
    for (int64_t c = 0; c < node.norms_[i].channels; ++c) {
      of[i].center[c] = static_cast<float>(mean(i, c));
      of[i].scale[c] = static_cast<float>(gamma(i, c) * scale(i, c));
      of[i].shift[c] = static_cast<float>(bias(i, c) - of[i].scale[c] * mean(i, c));  // of the scale as it is rounded
    }
  }
  // Backward: dy = al * (g + be * (y - center) + ga), where g is the gradient behind `weight` * (affine part), `sum`
  // its sum and `dot` that of g * (y - center). Returns the sum of g * x_hat.
  double finish_backward(size_t i, int64_t c, double weight, double sum, double dot, const Gradients& gradients) {
    const double r = scale(i, c), off = of[i].center[c] - mean(i, c), m = node.count();
    const double rw = r * weight * gamma(i, c), q = r * (dot + off * sum);
    of[i].al[c] = static_cast<float>(rw), of[i].be[c] = static_cast<float>(-r * q / m);
    of[i].ga[c] = static_cast<float>(-(sum + r * q * off) / m);
    if (!gradients.affine.empty()) {
      gradients.affine[2 * i][c] = static_cast<float>(weight * q);
      gradients.affine[2 * i + 1][c] = static_cast<float>(weight * sum);
    }
    return q;
  }
};

// What a mix step points to. norms: of the sources, -1: an identity; ops and edges that they belong to.
struct Node::Mixed {
  std::vector<MixSource> sources;
  std::vector<MixEdge> edges;
  std::vector<int> norms, of_edge, of_op;
  MixStep step{};

  Mixed(const Node& node, const Call& call, Coefficients& found, const Gradients* gradients) {
    const Spec& spec = node.spec_;
    const int n_ops = spec.n_operators();
    Room& room = found.room;
    const auto add = [&](int norm, int edge, int op, Planes y) {
      norms.push_back(norm), of_edge.push_back(edge), of_op.push_back(op);
      float *coefficient = room.take<float>(spec.N), *shift = room.take<float>(spec.N);
      const double weight = weight_of(call, edge, n_ops, op);
      for (int64_t c = 0; c < spec.N; ++c) {
        coefficient[c] = static_cast<float>(weight * (norm < 0 ? 1 : found.of[norm].scale[c]));
        if (norm >= 0) shift[c] = static_cast<float>(weight * found.of[norm].shift[c]);
      }
      const float* center = norm < 0 ? nullptr : found.of[norm].center;
      const float* of_images = norm < 0 ? nullptr : node.image_weights(call, edge);
      double* sums = of_images ? room.take<double>(kChunks * spec.N) : nullptr;
      sources.push_back({y, coefficient, shift, of_images, center, sums, room.take<double>(kChunks * spec.N)});
    };
    for (size_t i = 0; i < node.norms_.size(); ++i)
      if (!node.inner(i))
        add(static_cast<int>(i), node.norms_[i].edge, node.norms_[i].op, node.raw(call, node.norms_[i]));
    for (int e = 0; e < static_cast<int>(spec.inputs.size()); ++e) {
      const Input& in = spec.inputs[e];
      float skip = 0;
      for (int o = 0; o < n_ops; ++o)
        if (spec.operators[e * n_ops + o] == kSkip && in.stride == 1) {
          add(-1, e, o, call.inputs[e]);
          skip = static_cast<float>(weight_of(call, e, n_ops, o));
        }
      Planes bypass = call.inputs[e];
      bypass.at += spec.C / spec.k * bypass.channel;
      const Planes gx = gradients ? gradients->inputs[e] : Planes{};
      const bool there = gx.at && gradients->adds(e);
      edges.push_back({bypass, spec.C / spec.k, in.H, in.W, in.stride, call.edge_weights[e], gx, there,
                       gx.at && !there && skip == 0 && node.first_to_write(e) < 0, skip, room.take<double>(kChunks)});
    }
    step = {spec.B,
            spec.N,
            spec.k,
            node.H_,
            node.W_,
            static_cast<int>(sources.size()),
            static_cast<int>(edges.size()),
            sources.data(),
            edges.data(),
            call.node,
            room.take<double>(kChunks * spec.N)};
  }
  static double weight_of(const Call& call, int edge, int n_ops, int op) {
    return static_cast<double>(call.edge_weights[edge]) * call.operator_weights[edge * n_ops + op];
  }
};

const char* Node::forward(const Call& call) const {
  Coefficients found(*this, call);
  std::vector<std::vector<float>> inverses;
  Steps first, second;
  for (const Pools& p : pools_) inverses.push_back(inverse(p.edge));
  for (size_t i = 0; i < pools_.size(); ++i) {
    PoolStep s = step(call, pools_[i], inverses[i]);
    if (s.max.y.at) s.max.sums = found.of[pools_[i].max].sums;
    if (s.mean.y.at) s.mean.sums = found.of[pools_[i].mean].sums;
    first.pools.push_back(s);
  }
  for (const Block& b : blocks_) {
    BlockStep s = step(call, b);
    s.sums = found.of[b.to].sums + b.first, s.ld_sums = norms_[b.to].channels;
    if (b.from >= 0) s.scale = found.of[b.from].scale, s.shift = found.of[b.from].shift;
    (b.from < 0 ? first : second).blocks.push_back(s);
  }
  first.launch(false, false, call.threads);
  for (size_t i = 0; i < norms_.size(); ++i)
    if (!behind_inner(i)) found.finish(i);
  second.launch(false, true, call.threads);
  for (size_t i = 0; i < norms_.size(); ++i)
    if (behind_inner(i)) found.finish(i);
  const Mixed mixed(*this, call, found, nullptr);
  return Steps{{}, {}, {mixed.step}}.launch(false, false, call.threads);
}

const char* Node::backward(const Call& call, const Gradients& gradients) const {
  Coefficients found(*this, call);
  for (size_t i = 0; i < norms_.size(); ++i) found.load(i);
  const Mixed mixed(*this, call, found, &gradients);
  const char* ran = Steps{{}, {}, {mixed.step}}.launch(true, true, call.threads);
  finish_mixed(call, mixed, found, gradients);

  const bool weights = !gradients.weights.empty();
  std::vector<std::vector<float>> inverses;
  Steps first, second;  // in the order of backward: what reads the node's gradient, then what lies before an inner norm
  std::vector<const Block*> behind_first, behind_second;
  const auto turn = [&](Steps& steps, const std::vector<const Block*>& blocks) {  // once their norms' al is known
    for (size_t i = 0; i < blocks.size(); ++i) {
      const Block& b = *blocks[i];
      steps.blocks[i].pointwise_t =
          transposed(steps.blocks[i].pointwise, found.of[b.to].al + b.first, b.N, b.C, found.room);
    }
  };
  for (const Pools& p : pools_) inverses.push_back(inverse(p.edge));
  for (size_t i = 0; i < pools_.size(); ++i) {
    PoolStep s = step(call, pools_[i], inverses[i]);
    s.gx = gradients.inputs[pools_[i].edge], s.g = processed_gradient(call);
    if (!s.gx.at) continue;
    const auto put = [&](PoolStep::Kind& kind, int norm) {
      if (norm < 0) return;
      const Coefficients::Of& of = found.of[norm];
      kind.al = of.al, kind.be = of.be, kind.ga = of.ga, kind.center = of.center;
    };
    put(s.max, pools_[i].max), put(s.mean, pools_[i].mean);
    first.pools.push_back(s);
  }
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& b = blocks_[i];
    const bool wanted = gradients.inputs[b.edge].at;
    if (!wanted && !weights) continue;
    BlockStep s = step(call, b);
    Coefficients::Of& behind = found.of[b.to];
    s.be = behind.be + b.first, s.ga = behind.ga + b.first;
    s.image_weights = inner(b.to) ? nullptr : image_weights(call, b.edge);
    s.center = behind.center + b.first;
    s.g = inner(b.to) ? inner_gradient(call, b.to) : processed_gradient(call);
    s.g.at += b.first * s.g.channel;
    if (b.from >= 0) {
      Coefficients::Of& before = found.of[b.from];
      s.scale = before.scale, s.shift = before.shift;
      s.center_x = before.center;
      s.gx = inner_gradient(call, b.from), s.gx_sums = before.sums;
    } else if (wanted) {
      s.gx = gradients.inputs[b.edge];
      s.add = gradients.adds(b.edge) || mixed.edges[b.edge].skip != 0 || first_to_write(b.edge) != static_cast<int>(i);
      s.gx.at += b.shift;
    }
    if (weights) s.d_pointwise = call.work + b.d_pointwise;
    if (weights && b.depthwise >= 0) s.d_depthwise = call.work + b.d_depthwise;
    (inner(b.to) ? second : first).blocks.push_back(s);
    (inner(b.to) ? behind_second : behind_first).push_back(&b);
  }
  turn(first, behind_first);
  first.launch(true, false, call.threads);
  for (size_t i = 0; i < norms_.size(); ++i)
    for (int64_t c = 0; inner(i) && c < norms_[i].channels; ++c)
      found.finish_backward(i, c, 1, found.first(i, c), found.second(i, c), gradients);
  turn(second, behind_second);
  second.launch(true, true, call.threads);
  std::vector<Partial> partials;
  for (const Block& b : blocks_) {
    if (!weights) break;
    const float* al = found.of[b.to].al + b.first;
    partials.push_back({call.work + b.d_pointwise, b.C * b.N, gradients.weights[b.pointwise], al, b.C});
    if (b.depthwise >= 0)
      partials.push_back({call.work + b.d_depthwise, b.C * b.K * b.K, gradients.weights[b.depthwise]});
  }
  add_up(partials, call.threads);
  return ran;
}

// The gradients of the weights of edges and operators, and what the outer batch norms need.
void Node::finish_mixed(const Call& call, const Mixed& mixed, Coefficients& found, const Gradients& gradients) const {
  const int n_ops = spec_.n_operators();
  const int64_t N = spec_.N;
  std::vector<double> edges(spec_.inputs.size());
  for (size_t e = 0; e < edges.size(); ++e) edges[e] = over_chunks(mixed.edges[e].dots, 1, 0);
  for (size_t i = 0; i < edges.size() * n_ops; ++i) gradients.operator_weights[i] = 0;
  for (size_t s = 0; s < mixed.sources.size(); ++s) {
    const int norm = mixed.norms[s], e = mixed.of_edge[s], o = mixed.of_op[s];
    double dot = 0;
    for (int64_t c = 0; c < N; ++c) {
      const double sum = over_chunks(mixed.sources[s].sums ? mixed.sources[s].sums : mixed.step.sums, N, c);
      double q = over_chunks(mixed.sources[s].dots, N, c);
      if (norm >= 0) {
        q = found.finish_backward(norm, c, Mixed::weight_of(call, e, n_ops, o), sum, q, gradients);
        q = q * found.gamma(norm, c) + sum * found.bias(norm, c);
      }
      dot += q;
    }
    edges[e] += call.operator_weights[e * n_ops + o] * dot;
    gradients.operator_weights[e * n_ops + o] = static_cast<float>(call.edge_weights[e] * dot);
  }
  for (size_t e = 0; e < edges.size(); ++e) gradients.edge_weights[e] = static_cast<float>(edges[e]);
}

}  // namespace ftso
