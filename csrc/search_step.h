// What a search step does besides the network's passes: the betas' softmax, the loss, the optimizers' moves. Small, in
// one thread and one order; behind a pass each of PyTorch's own small operations would find its code out of the caches.
#pragma once
#include <cstdint>
#include <vector>

#include "skip_net.h"

namespace ftso {

// Of one cell type: softmax of the 14 betas among each node's edges, and from the edges' gradients the betas'.
void edge_weights(const double* betas, float* edges);
void edge_weights_bwd(const double* betas, const float* d_edges, double* d_betas);

// Mean cross entropy of logits [B][classes], and its gradient. labels: [B], below `classes`.
double cross_entropy(int64_t B, int64_t classes, const float* logits, const int64_t* labels, float* d_logits);

// The first label that is none of a class, or -1.
int64_t first_outside(int64_t B, int64_t classes, const int64_t* labels);

// A step of Adam with coupled weight decay on n parameters (Kingma & Ba, 2015; algorithm 1). steps: with this one.
struct Adam {
  double lr, decay_1, decay_2, eps, weight_decay;
  int64_t steps;
};
void adam(int64_t n, double* x, const double* gradient, double* first, double* second, const Adam& rule);

// One tensor of n values: parameters, their velocity, gradient.
struct Moved {
  int64_t n;
  float *w, *velocity, *gradient;
};
struct Sgd {
  double lr, momentum, weight_decay, limit;  // limit: on the gradients' common 2-norm
  bool nesterov;
};
// Moves all weights, unless the norm, which is returned, is not finite.
double sgd(const std::vector<Moved>& tensors, const Sgd& rule);

// What a search moves: the betas of normal and of reduction cells, and the weights as SkipNet takes them.
struct Searched {
  const double* betas[2];
  std::vector<Moved> weights;
};

// Mean cross entropy of a batch, and its gradient by both betas; where `d_betas` are null, by the weights, into theirs.
// Both passes' launches are then the network's. size: the sum of the betas' absolute gradients, not finite where one
// of them is not.
struct Found {
  double loss, size;
};
Found loss_and_gradient(SkipNet& net, float* memory, const float* images, const int64_t* labels,
                        const Searched& searched, double* const (&d_betas)[2], int threads);

}  // namespace ftso
