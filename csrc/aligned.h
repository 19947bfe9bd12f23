// A vector that begins at a cache line: its loads cross none, and its neighbours' stores do not disturb it.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace ftso {

template <typename T>
struct AtCacheLine {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};
  AtCacheLine() = default;
  template <typename U>
  AtCacheLine(const AtCacheLine<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, kLine); }
  template <typename U>
  bool operator==(const AtCacheLine<U>&) const {
    return true;
  }
  template <typename U>
  bool operator!=(const AtCacheLine<U>&) const {
    return false;
  }
};

template <typename T>
using Aligned = std::vector<T, AtCacheLine<T>>;

// The same left untouched until something is written: what nobody needs then costs no memory.
template <typename T>
struct Untouched : AtCacheLine<T> {
  using value_type = T;
  template <typename U>
  struct rebind {
    using other = Untouched<U>;
  };
  Untouched() = default;
  template <typename U>
  Untouched(const Untouched<U>&) {}
  template <typename U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
};

template <typename T>
using Partials = std::vector<T, Untouched<T>>;

// The small arrays of one pass, each at a cache line and zero: one allocation is a small edge's hundred.
class Room {
  static constexpr std::size_t kBytes = 1 << 16, kLine = 64;
  std::vector<Partials<unsigned char>> blocks_;
  std::size_t used_ = 0;

 public:
  template <typename T>
  T* take(int64_t n) {
    const std::size_t bytes = (static_cast<std::size_t>(n) * sizeof(T) + kLine - 1) / kLine * kLine;
    if (blocks_.empty() || used_ + bytes > blocks_.back().size())
      blocks_.emplace_back(std::max(kBytes, bytes)), used_ = 0;
    T* found = reinterpret_cast<T*>(blocks_.back().data() + used_);
    std::uninitialized_value_construct_n(found, n);
    used_ += bytes;
    return found;
  }
};

}  // namespace ftso
