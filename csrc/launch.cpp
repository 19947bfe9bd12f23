#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <vector>

#include "aligned.h"
#include "ftso.h"
#include "threads.h"

namespace ftso {

// An OpenMP region in a child forked after one ran in its parent waits for threads that are not there.
static bool forked = false;
[[maybe_unused]] static const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

bool in_forked_child() { return forked; }

float* thread_scratch(int64_t floats) {
  thread_local Aligned<float> scratch;
  if (static_cast<int64_t>(scratch.size()) < floats) scratch.resize(floats);
  return scratch.data();
}

namespace {

struct Cycles {
  std::vector<int32_t> channels, lengths;
  int64_t longest = 0;

  // out[c * k + g] = in[g * (C / k) + c]
  Cycles(int64_t C, int64_t k) {
    std::vector<char> seen(C, 0);
    for (int64_t first = 0; first < C; ++first) {
      if (seen[first]) continue;
      int64_t length = 0;
      for (int64_t c = first; !seen[c]; c = (c % (C / k)) * k + c / (C / k), ++length) {
        seen[c] = 1;
        channels.push_back(static_cast<int32_t>(c));
      }
      lengths.push_back(static_cast<int32_t>(length));
      longest = std::max(longest, length);
    }
  }
  SkipCell cell(int64_t C, int64_t HW) const {
    return {C, HW, channels.data(), lengths.data(), static_cast<int32_t>(lengths.size())};
  }
};

// One parallel region over the images; each thread gets a range and a scratch of its own.
template <typename Work>
void over_images(int64_t B, int threads, int64_t scratch_floats, Work work) {
  over_chunks_of_work(threads, threads, [=](int64_t part) {
    work(B * part / threads, B * (part + 1) / threads, thread_scratch(scratch_floats));
  });
}

}  // namespace

bool populate([[maybe_unused]] char* pages, [[maybe_unused]] int64_t bytes, [[maybe_unused]] double patience,
              [[maybe_unused]] int threads) {
#ifdef MADV_POPULATE_WRITE
  constexpr int64_t kPart = 2 << 20;  // a huge page
  constexpr double kFirst = 8;        // parts' patience to begin with: single ones may be slow
  std::atomic<double> left = kFirst * patience;
  std::atomic<bool> huge = true;
  over_chunks_of_work((bytes + kPart - 1) / kPart, threads, [&](int64_t i) {
    char* const part = pages + i * kPart;
    const size_t n = static_cast<size_t>(std::min(kPart, bytes - i * kPart));
    if (!huge) madvise(part, n, MADV_NOHUGEPAGE);
    const auto start = std::chrono::steady_clock::now();
    const bool there = !madvise(part, n, MADV_POPULATE_WRITE);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    double before = left;
    while (!left.compare_exchange_weak(before, before + patience - taken.count())) continue;
    if (!there || before + patience < taken.count()) huge = false;
  });
  return huge;
#else
#ifdef MADV_NOHUGEPAGE
  madvise(pages, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
#endif
  return false;
#endif
}

const char* skip_cell_fwd(int64_t B, int64_t C, int64_t HW, int64_t k, const float* x0, const float* x1,
                          const float* weights, float* out, int threads) {
  const Kernels& isa = kernels();
  const Cycles cycles(C, k);
  const SkipCell cell = cycles.cell(C, HW);
  const char* ran = isa.isa;
  over_images(B, threads, 0, [&](int64_t begin, int64_t end, float*) {
    const char* name = isa.skip_cell_fwd(cell, begin, end, x0, x1, weights, out);
    if (begin == 0) ran = name;
  });
  return ran;
}

const char* skip_cell_bwd(int64_t B, int64_t C, int64_t HW, int64_t k, const float* grad_out, const float* x0,
                          const float* x1, const float* weights, float* grad_x0, float* grad_x1, float* grad_weights,
                          int threads) {
  const Kernels& isa = kernels();
  const Cycles cycles(C, k);
  const SkipCell cell = cycles.cell(C, HW);
  std::vector<double> dots(grad_weights ? B * kEdges : 0);
  const char* ran = isa.isa;
  over_images(B, threads, skip_cell_scratch(cycles.longest), [&](int64_t begin, int64_t end, float* scratch) {
    const char* name = isa.skip_cell_bwd(cell, begin, end, grad_out, x0, x1, weights, grad_x0, grad_x1,
                                         grad_weights ? dots.data() : nullptr, scratch);
    if (begin == 0) ran = name;
  });
  for (int e = 0; grad_weights && e < kEdges; ++e) {
    double sum = 0;
    for (int64_t b = 0; b < B; ++b) sum += dots[b * kEdges + e];
    grad_weights[e] = static_cast<float>(sum);
  }
  return ran;
}

const char* folded_conv(const FoldedConv& spec, Planes x, const float* const* weights, const float* const* biases,
                        Planes plus, Planes y, int threads) {
  BlockStep first{};
  first.B = spec.B, first.H = spec.H, first.W = spec.row, first.C = spec.channels[0], first.N = spec.channels[1];
  first.K = spec.K, first.S = spec.stride, first.D = spec.dilation;
  first.Ho = (spec.H + spec.stride - 1) / spec.stride, first.Wo = (spec.W + spec.stride - 1) / spec.stride;
  if (spec.K > 1) first.depthwise = *weights++;
  first.pointwise = *weights++, first.bias = biases[0], first.x = x, first.y = y, first.plus = plus;
  BlockStep second = first;
  const bool two = spec.blocks == 2;
  if (two) {
    first.plus = {};
    first.y = {nullptr, first.N * first.Ho * first.Wo, first.Ho * first.Wo};
    second.C = first.N, second.N = spec.channels[2], second.S = 1, second.H = first.Ho, second.W = first.Wo;
    second.depthwise = weights[0], second.pointwise = weights[1], second.bias = biases[1];
  }
  const Kernels& isa = kernels();
  const int64_t floats = two ? chain_scratch(first, second) : block_scratch(first);
  const char* ran = isa.isa;
  over_chunks_of_work(kChunks, threads, [&](int64_t chunk) {
    float* scratch = thread_scratch(floats);
    const char* name = two ? isa.chain_infer(first, second, chunk, scratch) : isa.block_infer(first, chunk, scratch);
    if (chunk == 0) ran = name;
  });
  return ran;
}

const char* fma_peak(int64_t rounds, double* operations, int threads) {
  const Kernels& isa = kernels();
  std::vector<double> done(threads);
  std::vector<const char*> ran(threads);
  over_chunks_of_work(threads, threads, [&](int64_t part) { ran[part] = isa.fma_peak(rounds, &done[part]); });
  *operations = 0;
  for (double n : done) *operations += n;
  return ran[0];
}

}  // namespace ftso
