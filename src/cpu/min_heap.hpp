// A binary min-heap over memory of the caller.
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

  void push(T item) {
    std::int64_t hole = size_++;
    while (hole > 0) {
      std::int64_t const parent = (hole - 1) / 2;
      if (!(item < items_[parent])) break;
      items_[hole] = items_[parent];
      hole = parent;
    }
    items_[hole] = item;
  }

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
  // Fills the hole at the root: `item` goes where no child is smaller.
  void sift_down(T item) {
    std::int64_t hole = 0;
    for (;;) {
      std::int64_t child = 2 * hole + 1;
      if (child >= size_) break;
      if (child + 1 < size_) child += items_[child + 1] < items_[child];
      if (!(items_[child] < item)) break;
      items_[hole] = items_[child];
      hole = child;
    }
    items_[hole] = item;
  }

  T* items_;
  std::int64_t size_ = 0;
};

}  // namespace sparsek::cpu
