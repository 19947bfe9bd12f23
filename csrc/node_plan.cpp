// The plan of a mixed node: which blocks and pools it consists of, and where everything lies.
#include "node.h"

namespace ftso {
namespace {

int64_t whole_lines(int64_t floats) { return rounded_up(floats, kLanes); }

}  // namespace

Node::Node(const Spec& spec) : spec_(spec) {
  const Input& first = spec_.inputs.front();
  H_ = (first.H + first.stride - 1) / first.stride, W_ = (first.W + first.stride - 1) / first.stride;
  for (int e = 0; e < static_cast<int>(spec_.inputs.size()); ++e) {
    pools_.push_back({e, -1, -1});
    for (int o = 0; o < spec_.n_operators(); ++o) plan_operator(e, o, n_weights_);
    if (pools_.back().max < 0 && pools_.back().mean < 0) pools_.pop_back();
  }
}

int Node::norm(int edge, int op, int64_t channels, bool inner) {
  Norm n{channels, saved_floats_, 0, edge, op, inner, 0};
  saved_floats_ += whole_lines(spec_.B * channels * pixels());
  n.statistics = saved_floats_;
  saved_floats_ += whole_lines(4 * channels);
  if (inner) n.gradient = work_floats_, work_floats_ += whole_lines(spec_.B * channels * pixels());
  norms_.push_back(n);
  return static_cast<int>(norms_.size()) - 1;
}

void Node::block(int edge, int K, int S, int D, int from, int to, int64_t first, int64_t N, int64_t shift,
                 int& weight) {
  Block b{edge, K, S, D, from, to, spec_.C / spec_.k, N, first, shift, -1, 0, 0, 0};
  if (K > 1) {
    b.depthwise = weight++;
    b.d_depthwise = work_floats_, work_floats_ += whole_lines(kChunks * b.C * K * K);
  }
  b.pointwise = weight++;
  b.d_pointwise = work_floats_, work_floats_ += whole_lines(kChunks * b.C * N);
  blocks_.push_back(b);
}

void Node::plan_operator(int edge, int op, int& weight) {
  const int64_t C = spec_.C / spec_.k, N = spec_.N;
  const int S = spec_.inputs[edge].stride, kind = spec_.operators[edge * spec_.n_operators() + op];
  switch (kind) {
    case kNone:
      break;
    case kMaxPool:
      pools_.back().max = norm(edge, op, C, false);
      break;
    case kAvgPool:
      pools_.back().mean = norm(edge, op, C, false);
      break;
    case kSep3:
    case kSep5: {
      const int K = kind == kSep3 ? 3 : 5, inner = norm(edge, op, C, true), outer = norm(edge, op, N, false);
      block(edge, K, S, 1, -1, inner, 0, C, 0, weight);
      block(edge, K, 1, 1, inner, outer, 0, N, 0, weight);
      break;
    }
    case kDil3:
    case kDil5:
      block(edge, kind == kDil3 ? 3 : 5, S, 2, -1, norm(edge, op, N, false), 0, N, 0, weight);
      break;
    case kReluConvBn:
      block(edge, 1, 1, 1, -1, norm(edge, op, N, false), 0, N, 0, weight);
      break;
    case kSkip:
    case kFactorizedReduce:
      if (S == 1) break;
      const int both = norm(edge, op, N, false);
      block(edge, 1, 2, 1, -1, both, 0, N / 2, 0, weight);
      block(edge, 1, 2, 1, -1, both, N / 2, N / 2, spec_.inputs[edge].W + 1, weight);
      break;
  }
}

Planes Node::raw(const Call& call, const Norm& n, int64_t first) const {
  return {call.saved + n.raw + first * pixels(), n.channels * pixels(), pixels()};
}

BlockStep Node::step(const Call& call, const Block& b) const {
  BlockStep s{};
  s.B = spec_.B, s.C = b.C, s.N = b.N, s.K = b.K, s.S = b.S, s.D = b.D, s.Ho = H_, s.Wo = W_;
  s.H = b.from < 0 ? spec_.inputs[b.edge].H : H_, s.W = b.from < 0 ? spec_.inputs[b.edge].W : W_;
  s.x = b.from < 0 ? call.inputs[b.edge] : raw(call, norms_[b.from]);
  s.x.at += b.shift;
  s.depthwise = b.depthwise < 0 ? nullptr : call.weights[b.depthwise];
  s.pointwise = call.weights[b.pointwise];
  s.y = raw(call, norms_[b.to], b.first);
  return s;
}

PoolStep Node::step(const Call& call, const Pools& p, const std::vector<float>& inverse) const {
  const Input& in = spec_.inputs[p.edge];
  PoolStep s{};
  s.B = spec_.B, s.C = spec_.C / spec_.k, s.H = in.H, s.W = in.W, s.Ho = H_, s.Wo = W_, s.S = in.stride;
  s.x = call.inputs[p.edge], s.inverse = inverse.data();
  if (p.max >= 0) s.max.y = raw(call, norms_[p.max]);
  if (p.mean >= 0) s.mean.y = raw(call, norms_[p.mean]);
  return s;
}

bool Node::behind_inner(std::size_t norm) const {
  for (const Block& b : blocks_)
    if (b.to == static_cast<int>(norm) && b.from >= 0) return true;
  return false;
}

int Node::first_to_write(int edge) const {
  for (const Pools& p : pools_)
    if (p.edge == edge) return -1;  // they add
  for (const bool second_launch : {false, true})
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const Block& b = blocks_[i];
      if (b.edge == edge && b.from < 0 && inner(b.to) == second_launch) return b.K > 1 || b.S == 1 ? i : -1;
    }
  return -1;
}

Planes Node::inner_gradient(const Call& call, int norm) const {
  const Norm& n = norms_[norm];
  return {call.work + n.gradient, n.channels * pixels(), pixels()};
}

// Processed channels stand at every k-th channel of the node.
Planes Node::processed_gradient(const Call& call) const {
  return {call.node.at, call.node.image, spec_.k * call.node.channel};
}

std::vector<float> Node::inverse(int edge) const {
  const Input& in = spec_.inputs[edge];
  const auto there = [&](int64_t at, int64_t size) {
    const int64_t first = at * in.stride - 1, last = first + 2;
    return (last < size ? last : size - 1) - (first > 0 ? first : 0) + 1;
  };
  std::vector<float> found(pixels());
  for (int64_t r = 0; r < H_; ++r)
    for (int64_t c = 0; c < W_; ++c)
      found[r * W_ + c] = static_cast<float>(1.0 / static_cast<double>(there(r, in.H) * there(c, in.W)));
  return found;
}

}  // namespace ftso
