// A min-heap over memory of the caller, with four children per node.
//
// NOTE: against two children, half the levels, and on each the comparisons of two pairs run side by
// side: a quarter faster in select.
#pragma once
#include <cstdint>
#include <utility>

namespace sparsek::cpu {

template <typename T>
class MinHeap {
 public:
  explicit MinHeap(T* storage) : items_(storage) {}

  std::int64_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  T const& min() const { return items_[0]; }
  T const* begin() const { return items_; }
  T const* end() const { return items_ + size_; }

  void push(T item) { rise(size_++, item); }

  T replace_min(T item) {
    T const old = items_[0];
    sift_down(item);
    return old;
  }

  T pop() {
    T const old = items_[0];
    if (--size_ > 0) sift_down(items_[size_]);
    return old;
  }

 private:
  // Fills the hole at the root: the hole moves to a leaf along the smaller children, then `item`
  // rises from there. NOTE: an item that comes in at the root mostly belongs near the leaves;
  // comparing it on the way down would be a branch that the processor mispredicts once per call.
  void sift_down(T item) {
    std::int64_t hole = 0, first = 1;
    for (; first + kChildren <= size_; first = kChildren * hole + 1) {
      std::int64_t const a = first + (items_[first + 1] < items_[first]);
      std::int64_t const b = first + 2 + (items_[first + 3] < items_[first + 2]);
      std::int64_t const child = a + (b - a) * (items_[b] < items_[a]);  // without a branch
      items_[hole] = items_[child];
      hole = child;
    }
    if (first < size_) {  // the last node, with fewer children
      std::int64_t child = first;
      for (std::int64_t other = first + 1; other < size_; ++other) {
        if (items_[other] < items_[child]) child = other;
      }
      items_[hole] = items_[child];
      hole = child;
    }
    rise(hole, item);
  }

  void rise(std::int64_t hole, T item) {
    while (hole > 0) {
      std::int64_t const parent = (hole - 1) / kChildren;
      if (!(item < items_[parent])) break;
      items_[hole] = items_[parent];
      hole = parent;
    }
    items_[hole] = item;
  }

  static constexpr std::int64_t kChildren = 4;

  T* items_;
  std::int64_t size_ = 0;
};

}  // namespace sparsek::cpu
