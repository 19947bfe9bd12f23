// What a stage computes and moves at least: floating point operations as its products are padded, and the bytes of
// images and arena that it must read and write once. Weights and statistics are small and not counted.
#pragma once
#include "skip_net.h"

namespace ftso {

inline SkipNet::Work operator+(const SkipNet::Work& a, const SkipNet::Work& b) {
  return {a.flops + b.flops, a.bytes + b.bytes};
}

inline double count(const Shape& s) { return static_cast<double>(s.B * s.H * s.W); }

// The products that read a cell's output; backward their gradients for it, and for the weights where wanted.
inline SkipNet::Work work_of_readers(const CellStep& c, bool backward) {
  const double P = count(c.shape), K = static_cast<double>(c.K);
  const double N = static_cast<double>(c.product.N), S = static_cast<double>(c.strided.p.N);
  const double flops = 2 * P * K * N + P * K * static_cast<double>(c.strided.width), rows = P * N + P / 4 * S;
  return {flops * (backward && c.product.dw ? 2 : 1), 4 * rows * (backward ? 2 : 1)};
}

inline SkipNet::Work work_of(const CellStep& c, bool backward) {
  const int gradients = (c.x0.g != nullptr) + (c.x1.g != nullptr);
  return work_of_readers(c, backward) + SkipNet::Work{0, count(c.shape) * static_cast<double>(c.K) * (2 + gradients)};
}

inline SkipNet::Work work_of(const ReduceStep& r, bool backward) {
  const double both = static_cast<double>(2 * (r.F + r.C)), gradients = static_cast<double>(r.ld_nodes + 2 * r.C);
  return work_of_readers(r.cell, backward) +
         SkipNet::Work{0, 4 * count(r.cell.shape) * (both + (backward ? gradients : 0))};
}

inline SkipNet::Work work_of(const ReducePaths& r, bool backward) {
  const double P = count(r.shape), Q = P / 4, q = static_cast<double>(r.q), F = static_cast<double>(r.F);
  const double C = static_cast<double>(r.C), X = static_cast<double>(r.X);
  if (!backward) return {2 * 2 * Q * 2 * q * F, 4 * 2 * (P * C + Q * (F + C))};
  SkipNet::Work total{0, 0};
  for (int i = 0; i < 2; ++i)
    if (r.x[i].g || r.dw[i])
      total = total + SkipNet::Work{2 * Q * F * (X + (r.dw[i] ? 2 * q : 0)),
                                    4 * (Q * (F + C + static_cast<double>(r.ld_nodes)) + P * C * (r.x[i].g ? 2 : 1))};
  return total;
}

inline SkipNet::Work work_of_covariance(const StemStep& s) {
  const int64_t patch = s.K + 1;
  return {2 * count(s.shape) * static_cast<double>(patch * padded(patch)),
          4 * count(s.shape) * static_cast<double>(s.channels)};
}

// Backward computes the convolution once more, and its weights' gradient beside the product's two.
inline SkipNet::Work work_of(const StemStep& s, bool backward) {
  const int64_t passes = backward ? 2 : 1;
  return {2 * count(s.shape) * static_cast<double>(passes * s.S * (s.K + s.product.N)),
          4 * count(s.shape) * static_cast<double>(s.channels + passes * s.product.N)};
}

}  // namespace ftso
