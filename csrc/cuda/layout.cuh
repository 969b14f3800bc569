// Where the elements of a row of coefficients stand in the value that they multiply.
#pragma once

#include "cpu/kernels.h"
#include "cuda/launch.cuh"

namespace pycert::cuda {

using cpu::Extent;
using cpu::RowMap;
using cpu::Window;

__host__ __device__ inline int64_t row_size(const Window& w, const Extent& e) {
  return w.dense ? e.channels * e.height * e.width : e.channels * w.height * w.width;
}

__device__ inline int64_t source_of(const RowMap& map, int64_t q) { return map.source == nullptr ? q : map.source[q]; }

template <typename T>
__device__ inline T sign_of(const RowMap& map, int64_t q) {
  return q >= map.negative_from ? T(-1) : T(1);
}

// Whether the row is left out; null: none is.
__device__ inline bool is_left_out(const int64_t* sample, int64_t q) { return sample != nullptr && sample[q] < 0; }

__device__ inline int64_t numel_of(const Extent& e) { return e.channels * e.height * e.width; }

// The layout of one row. Element k is (c, y, x) of the window, that is pixel (top + y, left + x) of channel c; what
// lies outside the image is padding. All positions within a row are 32-bit (kLongestRow).
struct Layout {
  bool dense;
  int channels, image_height, image_width, height, width, top = 0, left = 0;

  __device__ Layout(const Window& w, const Extent& e, const RowMap& map, int64_t q)
      : dense(w.dense), channels(int(e.channels)), image_height(int(e.height)), image_width(int(e.width)) {
    height = dense ? image_height : int(w.height);
    width = dense ? image_width : int(w.width);
    if (dense) return;
    const int64_t* position = map.position + 2 * q;
    top = int(w.stride_y * position[0] + w.offset_y);
    left = int(w.stride_x * position[1] + w.offset_x);
  }

  __device__ int size() const { return channels * height * width; }

  // Element k of the row as an element of the sample's value; -1: padding.
  __device__ int index_of(int k) const {
    if (dense) return k;
    const int x = k % width + left, rest = k / width, y = rest % height + top, c = rest / height;
    if (y < 0 || y >= image_height || x < 0 || x >= image_width) return -1;
    return (c * image_height + y) * image_width + x;
  }

  // Element `index` of the sample's value as an element of the row; -1: outside the window.
  __device__ int element_of(int index) const {
    if (dense) return index;
    const int x = index % image_width - left, rest = index / image_width, y = rest % image_height - top;
    if (y < 0 || y >= height || x < 0 || x >= width) return -1;
    return (rest / image_height * height + y) * width + x;
  }
};

}  // namespace pycert::cuda
