// A vector that begins at a cache line: its loads cross none, and its neighbours' stores do not disturb it.
#pragma once
#include <cstddef>
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

}  // namespace ftso
