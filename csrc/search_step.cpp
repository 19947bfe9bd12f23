#include "search_step.h"

#include <algorithm>
#include <cmath>

#include "ftso.h"

namespace ftso {

// work(first edge, edges) of every node.
template <typename Work>
static void every_node(Work work) {
  for (int first = 0, edges = 2; first < kEdges; first += edges++) work(first, edges);
}

static void softmax(const double* x, int n, double* y) {
  const double largest = *std::max_element(x, x + n);
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += y[i] = std::exp(x[i] - largest);
  for (int i = 0; i < n; ++i) y[i] /= sum;
}

void edge_weights(const double* betas, float* edges) {
  double own[kEdges];
  every_node([&](int first, int n) { softmax(betas + first, n, own + first); });
  std::copy(own, own + kEdges, edges);
}

void edge_weights_bwd(const double* betas, const float* d_edges, double* d_betas) {
  double own[kEdges];
  every_node([&](int first, int n) {
    softmax(betas + first, n, own);
    double mean = 0;
    for (int i = 0; i < n; ++i) mean += own[i] * d_edges[first + i];
    for (int i = 0; i < n; ++i) d_betas[first + i] = own[i] * (d_edges[first + i] - mean);
  });
}

double cross_entropy(int64_t B, int64_t classes, const float* logits, const int64_t* labels, float* d_logits) {
  std::vector<double> p(classes);
  double total = 0;
  for (int64_t b = 0; b < B; ++b, logits += classes, d_logits += classes) {
    const double largest = *std::max_element(logits, logits + classes);
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += p[c] = std::exp(logits[c] - largest);
    for (int64_t c = 0; c < classes; ++c)
      d_logits[c] = static_cast<float>((p[c] / sum - (c == labels[b])) / static_cast<double>(B));
    total += std::log(sum) + largest - logits[labels[b]];
  }
  return total / static_cast<double>(B);
}

int64_t first_outside(int64_t B, int64_t classes, const int64_t* labels) {
  const auto outside = [=](int64_t label) { return label < 0 || label >= classes; };
  const int64_t at = std::find_if(labels, labels + B, outside) - labels;
  return at < B ? at : -1;
}

void adam(int64_t n, double* x, const double* gradient, double* first, double* second, const Adam& rule) {
  const double steps = static_cast<double>(rule.steps);
  const double size = rule.lr / (1 - std::pow(rule.decay_1, steps));
  const double unbias = std::sqrt(1 - std::pow(rule.decay_2, steps));
  for (int64_t i = 0; i < n; ++i) {
    const double g = gradient[i] + rule.weight_decay * x[i];
    first[i] += (1 - rule.decay_1) * (g - first[i]);
    second[i] = rule.decay_2 * second[i] + (1 - rule.decay_2) * g * g;
    x[i] -= size * first[i] / (std::sqrt(second[i]) / unbias + rule.eps);
  }
}

// In eight sums: one would wait for each addition before the next.
static double square(const Moved& t) {
  double sums[8] = {}, total = 0;
  int64_t i = 0;
  for (; i + 8 <= t.n; i += 8)
    for (int lane = 0; lane < 8; ++lane) {
      const double g = t.gradient[i + lane];
      sums[lane] += g * g;
    }
  for (; i < t.n; ++i) total += static_cast<double>(t.gradient[i]) * t.gradient[i];
  for (double sum : sums) total += sum;
  return total;
}

double sgd(const std::vector<Moved>& tensors, const Sgd& rule) {
  double squares = 0;
  for (const Moved& t : tensors) squares += square(t);
  const double norm = std::sqrt(squares);
  if (!std::isfinite(norm)) return norm;
  const float scale = static_cast<float>(std::min(rule.limit / (norm + 1e-6), 1.0));
  const float lr = static_cast<float>(rule.lr), momentum = static_cast<float>(rule.momentum);
  const float decay = static_cast<float>(rule.weight_decay);
  for (const Moved& t : tensors)
    for (int64_t i = 0; i < t.n; ++i) {
      const float d = decay * t.w[i] + scale * t.gradient[i];
      const float v = momentum * t.velocity[i] + d;
      t.velocity[i] = v, t.w[i] -= lr * (rule.nesterov ? momentum * v + d : v);
    }
  return norm;
}

Found loss_and_gradient(SkipNet& net, float* memory, const float* images, const int64_t* labels,
                        const Searched& searched, double* const (&d_betas)[2], int threads) {
  const int64_t B = net.spec().B, classes = net.spec().classes;
  const bool by_betas = d_betas[0];
  std::vector<const float*> weights;
  std::vector<float*> d_weights;
  for (const Moved& t : searched.weights) weights.push_back(t.w), d_weights.push_back(t.gradient);
  float edges[2][kEdges], d_edges[2][kEdges];
  for (int type = 0; type < 2; ++type) edge_weights(searched.betas[type], edges[type]);
  std::vector<float> logits(B * classes), d_logits(B * classes);
  net.forward(memory, !by_betas, images, weights.data(), edges[0], edges[1], logits.data(), threads);
  const double loss = cross_entropy(B, classes, logits.data(), labels, d_logits.data());
  net.backward(memory, images, weights.data(), edges[0], edges[1], d_logits.data(), by_betas ? d_edges[0] : nullptr,
               by_betas ? d_edges[1] : nullptr, by_betas ? nullptr : d_weights.data(), threads);
  double size = 0;
  for (int type = 0; by_betas && type < 2; ++type) {
    edge_weights_bwd(searched.betas[type], d_edges[type], d_betas[type]);
    for (int e = 0; e < kEdges; ++e) size += std::abs(d_betas[type][e]);
  }
  return {loss, size};
}

}  // namespace ftso
