// The skip-only super-network as a chain of stages between batch norms. Plans once for a shape, runs often.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "aligned.h"
#include "chunks.h"
#include "ftso.h"

namespace ftso {

constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
constexpr int64_t pixels(const Shape& s) { return s.B * s.H * s.W; }

class SkipNet {
 public:
  // What the 1x1 convolutions behind the cells multiply: floats; bfloat16 where gradients go back to activations
  // (forward stays exact, and with it every relu's and maximum's choice); bfloat16 there and forward.
  enum Precision { kFloat32, kBf16Backward, kBf16 };
  struct Spec {
    int64_t B, H, W, in_channels, channels, cells, k, classes, precision;
  };
  explicit SkipNet(const Spec& spec);
  const Spec& spec() const { return spec_; }

  // Floats of the one arena that a forward and its backward pass work in. Its buffers share room as their lifetimes
  // allow, so a backward pass uses up what forward left.
  // The two kinds of pass are planned apart, and neither plan is always the larger.
  int64_t arena_floats() const { return std::max(with_weights_.floats, betas_only_.floats); }

  // memory: arena_floats(), at 64 bytes. weights: in the order of PC-DARTS' parameters, contiguous.
  // edges_*: 14 softmaxed edge weights. logits: [B][classes]. with_weights: the backward pass to come will
  // want the weights' gradients too; d_weights is null otherwise, and what only those need is left out. d_edges_* null:
  // not wanted. Returns the instruction set that ran.
  const char* forward(float* memory, bool with_weights, const float* images, const float* const* weights,
                      const float* edges_normal, const float* edges_reduce, float* logits, int threads);
  const char* backward(float* memory, const float* images, const float* const* weights, const float* edges_normal,
                       const float* edges_reduce, const float* d_logits, float* d_edges_normal, float* d_edges_reduce,
                       float* const* d_weights, int threads);

  // Of the arena, the floats that forward leaves for backward: raw outputs and windows, nothing else.
  int64_t saved_floats() const;

  // Of the last backward pass: for each channel of a cell's input the sum of its gradient over all pixels, then for
  // each the sum of gradient times value.
  std::vector<double> input_sums(int64_t cell, int input) const;

  // The passes' launches since begin_launches(), in order; between any two, a batch norm's sums are finished. work:
  // what its text computes and moves at least, padding included.
  struct Work {
    double flops, bytes;
  };
  struct Launch {
    const char *stage, *isa;
    double seconds;
    Work work;
  };
  void begin_launches() { launches_.clear(); }
  const std::vector<Launch>& launches() const { return launches_; }

 private:
  struct Buffer {
    int64_t rows, columns;
    int64_t first, last;  // the stages between which it is alive
  };
  struct Part {  // `rows` output channels of one weight tensor, in columns from `column` of a product
    int64_t weight, rows, column;
  };
  // A raw product with its batch norm: columns are grouped by consumer.
  struct Tensor {
    Shape shape;
    int64_t N = 0, last = 0;               // padded columns; those of the last part begin here
    int64_t groups = 1, width = 0, K = 0;  // the activations: groups of `width` channels, K padded in all
    std::vector<Part> parts;
    bool strided = false;
    int64_t half = 0, split = 0, offset = 0;  // strided: width of a product, where the second one goes
    int windows_of = -1, input = 0;           // the reduction cell that reads the last part in windows, as its input
    int z = -1, g = -1;                       // buffers
    Aligned<float> w, wt, w2, wt2;
    Aligned<float> w_tiles, wt_tiles, w2_tiles, wt2_tiles;  // empty where nothing was packed for a tile unit
    Partials<float> dw, dw2;                                // by chunk: written in passes for weights only
    Aligned<float> scale, shift, al, be, ga;
    Aligned<double> mean, sums, back_sums;
  };
  struct Cell {
    bool reduction;
    int64_t C, padded;  // channels of a state
    Shape in, out;
    int source[2], column[2];  // tensors and columns of the two inputs
    int product = -1, strided = -1;
    int64_t stage;  // of the paths, if a reduction; of the nodes otherwise
    // reduction: the eight FactorizedReduce
    int64_t q = 0, F = 0, X = 0, weight = 0;
    int f = -1, d_nodes = -1, highest[2] = {-1, -1}, processed[2] = {-1, -1};
    int d_highest[2] = {-1, -1}, d_processed[2] = {-1, -1};
    Partials<float> dw[2];
    Aligned<float> w[2], wt[2], scale, shift, al, be, ga;
    Aligned<double> mean, sums, back_sums;
    std::vector<int32_t> fwd, bwd, to;
    Shuffle shuffle() const { return {padded / kLanes, C, fwd.data(), bwd.data(), to.data()}; }
  };
  struct Sum {  // some values of a partial
    Partials<float>* partial;
    int64_t first, size;
    void add() const;
  };
  struct Plan {
    std::vector<int64_t> offsets;
    int64_t floats = 0;
  };
  struct Run {  // what one pass works on
    float* memory;
    const std::vector<int64_t>* offsets;
    const float* images;
    const float* edges[2];  // normal, reduction
    float* pooled;
    const float* d_pooled;
    double* dots;
    bool weights, backward;
    bool wants(int tensor) const { return backward && (weights || tensor > 0); }  // a gradient for it
    float* at(int buffer) const { return buffer < 0 ? nullptr : memory + (*offsets)[buffer]; }
  };
  Plan make_plan(bool weights) const;
  const Plan& plan(bool weights) const { return weights ? with_weights_ : betas_only_; }

  void pack(Tensor& t, const float* const* weights);
  void split_all(Tensor& t) const;
  void unpack(const Tensor& t, float* const* d_weights) const;
  void pack_all(const float* const* weights, int threads);
  void unpack_all(const float* const* weights, float* const* d_weights, int threads);
  void unpack_stem(const float* const* weights, float* const* d_weights) const;
  void classify(const float* const* weights, float* logits, int threads) const;
  void unclassify(const float* const* weights, const float* d_logits, float* const* d_weights, int threads);
  void finish_stem(const float* const* weights);

  Product product(const Run& run, int tensor, bool with_weights);
  Source source(const Run& run, const Cell& c, int input);
  Source windows(const Run& run, const Cell& c, int input, const int (&z)[2], const int (&g)[2]);
  CellStep cell_step(const Run& run, size_t index);
  ReducePaths reduce_paths(const Run& run, Cell& c);
  ReduceStep reduce_step(const Run& run, size_t index);
  StemStep stem_step(const Run& run);
  int64_t cell_scratch(const CellStep& c) const;
  // Chunks of a weight gradient to be added up, in place of the first: by threads that find no chunk of the next launch
  // left, or in the end.
  void add_later(Partials<float>& partial);
  void add_now(int threads);

  template <typename Step>
  void launch(const char* name, const char* (*kernel)(const Step&, int64_t, float*), const Step& step, Work work,
              int64_t scratch, int threads);

  Spec spec_;
  std::vector<Launch> launches_;
  std::vector<Sum> later_;
  int64_t stem_, stem_padded_, n_weights_, n_stages_;
  std::vector<Tensor> tensors_;
  std::vector<Cell> cells_;
  std::vector<Buffer> buffers_;
  Plan with_weights_, betas_only_;
  // Of the stem's patches: partial sums by chunk, and their total.
  Aligned<double> patches_, covariance_;
  Aligned<double> dots_, stem_mean_, stem_rstd_, stem_sums_;
  Aligned<float> pooled_, d_pooled_;  // [B][4 * padded channels]
  Aligned<float> stem_w_, stem_w_tiles_, stem_scale_, stem_shift_;
  Partials<float> stem_dw_;
};

}  // namespace ftso
