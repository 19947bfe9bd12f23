// What a stage computes and moves at least: floating point operations as its products are padded, and the bytes of
// images and arena that it must read and write once. Weights and statistics are small and not counted.
#pragma once
#include "skip_net.h"

namespace ftso {

inline SkipNet::Work operator+(const SkipNet::Work& a, const SkipNet::Work& b) {
  return {a.flops + b.flops, a.bytes + b.bytes};
}

inline double count(const Shape& s) { return static_cast<double>(s.B * s.H * s.W); }

// Floats that a product's readers are left, or (backward) leave it, beside z: gradients and windows.
inline double of_windows(const Product& p, double pixels, bool backward) {
  return pixels / 4 * static_cast<double>(p.windows.C + (backward ? 2 * p.windows.q : 0));
}

inline double gradient_columns(const Product& p) { return static_cast<double>(p.N - p.windows.C); }

// The products that read a cell's output; backward their gradients for it, and for the weights where wanted.
inline SkipNet::Work work_of_readers(const CellStep& c, bool backward) {
  const double P = count(c.shape), K = static_cast<double>(c.K);
  const double N = static_cast<double>(c.product.N), S = static_cast<double>(c.strided.p.N);
  const double flops = 2 * P * K * N + P * K * static_cast<double>(c.strided.width);
  double rows = P * N + P / 4 * S;
  rows += of_windows(c.product, P, backward) + of_windows(c.strided.p, P / 4, backward);
  if (backward) rows += P * gradient_columns(c.product) + P / 4 * gradient_columns(c.strided.p);
  return {flops * (backward && c.product.dw ? 2 : 1), 4 * rows};
}

inline SkipNet::Work work_of(const CellStep& c, bool backward) {
  const int gradients = (c.x0.g != nullptr) + (c.x1.g != nullptr);
  return work_of_readers(c, backward) + SkipNet::Work{0, count(c.shape) * static_cast<double>(c.K) * (2 + gradients)};
}

inline SkipNet::Work work_of(const ReduceStep& r, bool backward) {
  const double paths = static_cast<double>((backward ? 3 : 2) * r.F);
  return work_of(r.cell, backward) + SkipNet::Work{0, 4 * count(r.cell.shape) * paths};
}

inline SkipNet::Work work_of(const ReducePaths& r, bool backward) {
  const double Q = count(r.shape), q = static_cast<double>(r.q), F = static_cast<double>(r.F);
  if (!backward) return {2 * 2 * Q * 2 * q * F, 4 * 2 * Q * (2 * q + F)};
  SkipNet::Work total{0, 0};
  for (int i = 0; i < 2; ++i) {
    const double gradient = r.x[i].g ? 1 : 0, weights = r.dw[i] ? 1 : 0;
    if (gradient + weights > 0)
      total = total + SkipNet::Work{2 * Q * F * (gradient * static_cast<double>(r.X) + weights * 2 * q),
                                    4 * Q * (2 * F + 2 * q * (1 + gradient))};
  }
  return total;
}

inline SkipNet::Work work_of_covariance(const StemStep& s) {
  const double pixels = count(s.shape), C = static_cast<double>(s.channels);
  return {2 * pixels * (13 * C + 1) * C, 4 * pixels * C};  // 13 offsets, and the constant
}

// Backward computes the convolution once more, and its weights' gradient beside the product's two.
inline SkipNet::Work work_of(const StemStep& s, bool backward) {
  const int64_t passes = backward ? 2 : 1;
  const double rows = static_cast<double>(s.channels + s.product.N) + (backward ? gradient_columns(s.product) : 0);
  return {2 * count(s.shape) * static_cast<double>(passes * s.S * (s.K + s.product.N)),
          4 * (count(s.shape) * rows + of_windows(s.product, count(s.shape), backward))};
}

}  // namespace ftso
