// A mixed node (kernels/partial_mix.py has the equation): the plan of its launches, and its two passes.
#pragma once
#include <cstddef>
#include <vector>

#include "ftso.h"

namespace ftso {

// In the order of kernels/operators.py.
enum Operator { kNone, kMaxPool, kAvgPool, kSkip, kSep3, kSep5, kDil3, kDil5, kReluConvBn, kFactorizedReduce };

class Node {
 public:
  struct Input {
    int64_t H, W;
    int stride;
  };
  // C channels a state of which C/k are processed; an operator has N of them behind it (C/k, or stand-alone any).
  // operators: as many for each edge, edge after edge.
  struct Spec {
    int64_t B, C, N, k;
    std::vector<int> operators;
    std::vector<Input> inputs;
    int n_operators() const { return static_cast<int>(operators.size() / inputs.size()); }
  };
  // One call. affine: weight and bias of every batch norm, or empty. image_weights: [edges][B], what each image's
  // result of an edge's operators is multiplied with, pools and identities excepted; null: nothing. Gradients that
  // nobody wants are null or empty.
  struct Call {
    std::vector<Planes> inputs;
    const float *edge_weights, *operator_weights, *image_weights;
    std::vector<const float*> weights, affine;
    Planes node;  // backward: its gradient
    float *saved, *work;
    int threads;
  };
  struct Gradients {
    std::vector<Planes> inputs;
    float *edge_weights, *operator_weights;  // never null
    std::vector<float*> weights, affine;
    std::vector<bool> add;  // whether an input's gradient is added to what is there; empty: to none
    bool adds(int edge) const { return !add.empty() && add[edge]; }
  };

  explicit Node(const Spec& spec);
  int64_t saved_floats() const { return saved_floats_; }  // what forward leaves for backward
  int64_t work_floats() const { return work_floats_; }    // what a backward pass needs meanwhile
  const char* forward(const Call& call) const;
  const char* backward(const Call& call, const Gradients& gradients) const;

 private:
  // A batch norm: of `channels` raw planes at `raw`; its mean and 1/deviation are at `statistics`.
  struct Norm {
    int64_t channels, raw, statistics;
    int edge, op;
    bool inner;        // between the halves of a separable convolution
    int64_t gradient;  // inner: where the gradient for what is behind it goes, in `work`
  };
  struct Block {
    int edge, K, S, D, from, to;       // norms: `from` -1 is the edge's state
    int64_t C, N, first, shift;        // first of the norm's channels; pixels that x is shifted by
    int depthwise, pointwise;          // weights; depthwise -1: none
    int64_t d_depthwise, d_pointwise;  // their partial gradients, in `work`
  };
  struct Pools {
    int edge, max, mean;  // norms, -1: none
  };
  struct Steps;
  struct Coefficients;
  struct Mixed;

  int norm(int edge, int op, int64_t channels, bool inner);
  void block(int edge, int K, int S, int D, int from, int to, int64_t first, int64_t N, int64_t shift, int& weight);
  void plan_operator(int edge, int op, int& weight);
  int64_t pixels() const { return H_ * W_; }
  double count() const { return static_cast<double>(spec_.B * pixels()); }
  Planes raw(const Call& call, const Norm& n, int64_t first = 0) const;
  const float* image_weights(const Call& call, int edge) const {
    return call.image_weights ? call.image_weights + edge * spec_.B : nullptr;
  }
  BlockStep step(const Call& call, const Block& b) const;
  PoolStep step(const Call& call, const Pools& p, const std::vector<float>& inverse) const;
  std::vector<float> inverse(int edge) const;
  bool inner(std::size_t norm) const { return norms_[norm].inner; }
  // Whether the block before a norm reads what lies behind an inner one.
  bool behind_inner(std::size_t norm) const;
  Planes inner_gradient(const Call& call, int norm) const;
  Planes processed_gradient(const Call& call) const;
  // The block that is the first to reach the gradient of an edge's processed channels, and all of it; -1: none.
  int first_to_write(int edge) const;
  void finish_mixed(const Call& call, const Mixed& mixed, Coefficients& found, const Gradients& gradients) const;

  Spec spec_;
  int64_t H_, W_, saved_floats_ = 0, work_floats_ = 0;
  int n_weights_ = 0;
  std::vector<Norm> norms_;
  std::vector<Block> blocks_;
  std::vector<Pools> pools_;
};

}  // namespace ftso
