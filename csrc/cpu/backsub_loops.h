// Loops of the back-substitution family; compiled once per instruction set (isa_*.cpp), inside namespace
// pycert::cpu::<isa>. No include guard on purpose.
//
// Sums run in double, in eight strands per segment. For float32 coefficients every product is then exact, so that
// the charge for summing is gamma_N(2^-53) times the sum of magnitudes.

#include "cpu/lanes.h"

struct Sums {
  Doubles value{}, magnitude{}, error{};
};

// The part of row q that lies inside the image, as runs of neighbouring elements: f(offset in row, index in sample,
// length). `outside(offset, length)` is called for the rest, the padding.
template <typename Inside, typename Outside>
PYCERT_INLINE void for_runs(const Window& window, const Extent& extent, const int64_t* position, const Inside& inside,
                            const Outside& outside) {
  if (window.dense) {
    inside(int64_t(0), int64_t(0), extent.numel());
    return;
  }
  const int64_t top = window.stride_y * position[0] + window.offset_y;
  const int64_t left = window.stride_x * position[1] + window.offset_x;
  const int64_t from = std::min(std::max<int64_t>(0, -left), window.width);
  const int64_t to = std::max(from, std::min(window.width, extent.width - left));
  for (int64_t c = 0; c < extent.channels; ++c)
    for (int64_t y = 0; y < window.height; ++y) {
      const int64_t offset = (c * window.height + y) * window.width;
      if (top + y < 0 || top + y >= extent.height) {
        outside(offset, window.width);
        continue;
      }
      if (from > 0) outside(offset, from);
      if (to > from) inside(offset + from, (c * extent.height + top + y) * extent.width + left + from, to - from);
      if (to < window.width) outside(offset + to, window.width - to);
    }
}

inline int64_t row_size(const Window& window, const Extent& extent) {
  return window.dense ? extent.numel() : extent.channels * window.height * window.width;
}

inline const int64_t* position_of(const RowMap& map, int64_t q) {
  return map.position == nullptr ? nullptr : map.position + 2 * q;
}

inline int64_t source_of(const RowMap& map, int64_t q) { return map.source == nullptr ? q : map.source[q]; }

// Rows from q on that lie at the same place of the same sample, so that they read the same part of its tables.
inline int64_t rows_alike(const RowMap& map, const Window& window, const int64_t* lower_row, int64_t q, int64_t end) {
  if (window.dense) return 1;
  const int64_t* at = map.position;
  int64_t next = q + 1;
  while (next < end && map.sample[next] == map.sample[q] && at[2 * next] == at[2 * q] &&
         at[2 * next + 1] == at[2 * q + 1] && (lower_row == nullptr || lower_row[next] == lower_row[q]))
    ++next;
  return next - q;
}

// From how many rows on it pays to copy that part out, which makes a row one run (measured: 3 x 3 and 5 x 5 windows).
inline constexpr int64_t kWorthCopying = 3;

// One window of a table [n], zero outside the image.
template <typename T>
class WindowCopy {
 public:
  const T* operator()(const Window& window, const Extent& extent, const int64_t* position, const T* table) {
    values_.resize(size_t(row_size(window, extent)));
    T* to = values_.data();
    for_runs(
        window, extent, position,
        [&](int64_t offset, int64_t index, int64_t length) {
          std::copy(table + index, table + index + length, to + offset);
        },
        [&](int64_t offset, int64_t length) { std::fill(to + offset, to + offset + length, T(0)); });
    return to;
  }

 private:
  std::vector<T> values_;
};

inline int64_t grain(int64_t size) { return 1 + 32768 / std::max<int64_t>(1, size); }

template <typename T>
struct RelaxPointers {
  const T *lower_slope, *upper_slope, *lower_intercept, *upper_intercept, *bias, *charge;
};

template <bool kSound, bool kLowerIntercept, bool kBias, typename T>
PYCERT_INLINE void relax_run(const T* rows, T sign, T* out, const RelaxPointers<T>& p, int64_t n, Sums& sums) {
  Sums& s = sums;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const Lanes<T> a = sign * memory.load(rows + k);
    const Lanes<T> low = memory.load(p.lower_slope + k), high = memory.load(p.upper_slope + k);
    const Lanes<T> high_at = memory.load(p.upper_intercept + k);
    Lanes<T> low_at{};
    if constexpr (kLowerIntercept) low_at = memory.load(p.lower_intercept + k);
    const auto positive = a >= Lanes<T>{};
    const Lanes<T> z = a * (positive ? low : high);
    memory.store(out + k, z);
    const Doubles term = weigh(widen(a), widen(positive ? low_at : high_at));
    if constexpr (kBias) {
      const Doubles more = widen(z) * widen(memory.load(p.bias + k));
      s.value += term + more;
      if constexpr (kSound) s.magnitude += magnitude_of(term) + magnitude_of(more);
    } else {
      s.value += term;
      if constexpr (kSound) s.magnitude += magnitude_of(term);
    }
    if constexpr (kSound) s.error += widen(magnitude_of(z)) * widen(memory.load(p.charge + k));
  });
}

template <typename T, bool kSound, bool kLowerIntercept, bool kBias>
void relax_as(const RelaxArgs<T>& a) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  at::parallel_for(0, a.map.count, grain(size), [&](int64_t begin, int64_t end) {
    WindowCopy<T> low, high, low_at, high_at, bias, charge;
    const auto step = [&](int64_t q, const auto& runs) PYCERT_INLINED {
      const T sign = q >= a.map.negative_from ? T(-1) : T(1);
      const T* rows = a.rows + source_of(a.map, q) * size;
      Sums sums;
      runs(rows, sign, a.out + q * size, sums);
      a.constant[q] += total(sums.value);
      if (kSound) {
        a.magnitude[q] += total(sums.magnitude);
        a.error[q] += total(sums.error);
      }
    };
    for (int64_t q = begin, alike; q < end; q += alike) {
      alike = rows_alike(a.map, a.window, a.lower_row, q, end);
      const int64_t* position = position_of(a.map, q);
      const int64_t base = a.map.sample[q] * n, lower_base = a.lower_row == nullptr ? base : a.lower_row[q] * n;
      if (alike >= kWorthCopying) {
        const auto copy = [&](WindowCopy<T>& to, const T* table) { return to(a.window, a.extent, position, table); };
        const RelaxPointers<T> p{copy(low, a.lower_slope + lower_base),
                                 copy(high, a.upper_slope + base),
                                 kLowerIntercept ? copy(low_at, a.lower_intercept + lower_base) : nullptr,
                                 copy(high_at, a.upper_intercept + base),
                                 kBias ? copy(bias, a.bias) : nullptr,
                                 kSound ? copy(charge, a.charge + base) : nullptr};
        for (int64_t row = q; row < q + alike; ++row)
          step(row, [&](const T* rows, T sign, T* out, Sums& sums)
                        PYCERT_INLINED { relax_run<kSound, kLowerIntercept, kBias>(rows, sign, out, p, size, sums); });
        continue;
      }
      alike = 1;
      step(q, [&](const T* rows, T sign, T* out, Sums& sums) PYCERT_INLINED {
        for_runs(
            a.window, a.extent, position,
            [&](int64_t offset, int64_t index, int64_t length) PYCERT_INLINED {
              const int64_t at = base + index, lower_at = lower_base + index;
              const RelaxPointers<T> p{a.lower_slope + lower_at,
                                       a.upper_slope + at,
                                       kLowerIntercept ? a.lower_intercept + lower_at : nullptr,
                                       a.upper_intercept + at,
                                       kBias ? a.bias + index : nullptr,
                                       kSound ? a.charge + at : nullptr};
              relax_run<kSound, kLowerIntercept, kBias>(rows + offset, sign, out + offset, p, length, sums);
            },
            [&](int64_t offset, int64_t length) { std::fill(out + offset, out + offset + length, T(0)); });
      });
    }
  });
}

template <typename T>
void relax(const RelaxArgs<T>& a) {
  const bool sound = a.error != nullptr, lower = a.lower_intercept != nullptr, bias = a.bias != nullptr;
  if (sound) {
    if (lower) return bias ? relax_as<T, true, true, true>(a) : relax_as<T, true, true, false>(a);
    return bias ? relax_as<T, true, false, true>(a) : relax_as<T, true, false, false>(a);
  }
  if (lower) return bias ? relax_as<T, false, true, true>(a) : relax_as<T, false, true, false>(a);
  return bias ? relax_as<T, false, false, true>(a) : relax_as<T, false, false, false>(a);
}

template <typename T>
PYCERT_INLINE void dot_run(const T* row, const T* bias, const T* charge, int64_t n, Sums& sums) {
  Sums& s = sums;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const Doubles z = widen(memory.load(row + k));
    if (bias != nullptr) {
      const Doubles term = z * widen(memory.load(bias + k));
      s.value += term;
      s.magnitude += magnitude_of(term);
    }
    if (charge != nullptr) s.error += magnitude_of(z) * widen(memory.load(charge + k));
  });
}

template <typename T>
void dot(const DotArgs<T>& a) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  at::parallel_for(0, a.map.count, grain(size), [&](int64_t begin, int64_t end) {
    WindowCopy<T> bias, charge;
    const auto add = [&](int64_t q, const Sums& sums) {
      const double sign = q >= a.map.negative_from ? -1 : 1;
      if (a.bias != nullptr) a.constant[q] += sign * total(sums.value);
      if (a.magnitude != nullptr) a.magnitude[q] += total(sums.magnitude);
      if (a.error != nullptr) a.error[q] += total(sums.error);
    };
    for (int64_t q = begin, alike; q < end; q += alike) {
      alike = rows_alike(a.map, a.window, nullptr, q, end);
      const int64_t* position = position_of(a.map, q);
      const T* of_sample = a.charge == nullptr ? nullptr : a.charge + a.map.sample[q] * n;
      if (alike >= kWorthCopying) {
        const T* here = a.bias == nullptr ? nullptr : bias(a.window, a.extent, position, a.bias);
        const T* charges = of_sample == nullptr ? nullptr : charge(a.window, a.extent, position, of_sample);
        for (int64_t row = q; row < q + alike; ++row) {
          Sums sums;
          dot_run(a.rows + source_of(a.map, row) * size, here, charges, size, sums);
          add(row, sums);
        }
        continue;
      }
      alike = 1;
      const T* rows = a.rows + source_of(a.map, q) * size;
      Sums sums;
      for_runs(
          a.window, a.extent, position,
          [&](int64_t offset, int64_t index, int64_t length) PYCERT_INLINED {
            dot_run(rows + offset, a.bias == nullptr ? nullptr : a.bias + index,
                    of_sample == nullptr ? nullptr : of_sample + index, length, sums);
          },
          [](int64_t, int64_t) {});
      add(q, sums);
    }
  });
}

template <typename T>
PYCERT_INLINE void box_run(const T* row, T sign, const T* lower, const T* upper, int64_t n, Sums& sums) {
  Sums& s = sums;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const Lanes<T> a = sign * memory.load(row + k);
    const Lanes<T> end = least_end(a, memory.load(lower + k), memory.load(upper + k));
    const Doubles term = weigh(widen(a), widen(end));
    s.value += term;
    s.magnitude += magnitude_of(term);
  });
}

// sums.error holds the dual norm's sum (p = 2) or largest coefficient (p = 1).
template <typename T>
PYCERT_INLINE void ball_run(const T* row, T sign, const T* centre, int norm, int64_t n, Sums& sums) {
  Sums& s = sums;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const Doubles a = widen(sign * memory.load(row + k)), term = a * widen(memory.load(centre + k));
    s.value += term;
    s.magnitude += magnitude_of(term);
    const Doubles size = magnitude_of(a);
    s.error = norm == 2 ? s.error + a * a : (s.error < size ? size : s.error);
  });
}

template <typename T>
inline double dual_norm(const Sums& sums, int norm) {
  if (norm == 2) return euclidean_norm<T>(total(sums.error));
  double largest = 0;
  for (int j = 0; j < kStrands; ++j) largest = std::max(largest, sums.error[j]);
  return largest;
}

template <typename T>
void concretize(const ConcretizeArgs<T>& a) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  at::parallel_for(0, a.map.count, grain(size), [&](int64_t begin, int64_t end) {
    WindowCopy<T> low, high;
    const auto finish = [&](int64_t q, const Sums& sums) {
      double value = total(sums.value), magnitude = total(sums.magnitude);
      if (a.norm != 0) {
        const double reach = weigh(dual_norm<T>(sums, a.norm), double(a.eps[a.map.sample[q]]));
        value -= reach;
        magnitude += reach;
      }
      a.value[q] = value;
      if (a.magnitude != nullptr) a.magnitude[q] = magnitude;
    };
    const auto sign_of = [&](int64_t q) { return q >= a.map.negative_from ? T(-1) : T(1); };
    for (int64_t q = begin, alike; q < end; q += alike) {
      alike = rows_alike(a.map, a.window, nullptr, q, end);
      const int64_t* position = position_of(a.map, q);
      const int64_t base = a.map.sample[q] * n;
      if (a.norm == 0 && alike >= kWorthCopying) {
        const T *lower = low(a.window, a.extent, position, a.lower + base),
                *upper = high(a.window, a.extent, position, a.upper + base);
        for (int64_t row = q; row < q + alike; ++row) {
          Sums sums;
          box_run(a.rows + source_of(a.map, row) * size, sign_of(row), lower, upper, size, sums);
          finish(row, sums);
        }
        continue;
      }
      alike = 1;
      const T* rows = a.rows + source_of(a.map, q) * size;
      Sums sums;
      for_runs(
          a.window, a.extent, position,
          [&](int64_t offset, int64_t index, int64_t length) PYCERT_INLINED {
            const int64_t at = base + index;
            if (a.norm == 0)
              box_run(rows + offset, sign_of(q), a.lower + at, a.upper + at, length, sums);
            else
              ball_run(rows + offset, sign_of(q), a.centre + at, a.norm, length, sums);
          },
          [](int64_t, int64_t) {});
      finish(q, sums);
    }
  });
}

// Calls f(offset in `from`, offset in `to`, length) for the runs that both layouts and the image share.
template <typename F>
inline void for_shared_runs(const Window& from, const Window& to, const Extent& extent, const int64_t* position,
                            const F& f) {
  const auto corner = [&](const Window& w, int64_t axis) {
    if (w.dense) return int64_t(0);
    return axis == 0 ? w.stride_y * position[0] + w.offset_y : w.stride_x * position[1] + w.offset_x;
  };
  const int64_t from_height = from.dense ? extent.height : from.height,
                to_height = to.dense ? extent.height : to.height;
  const int64_t from_width = from.dense ? extent.width : from.width, to_width = to.dense ? extent.width : to.width;
  const int64_t from_top = corner(from, 0), to_top = corner(to, 0);
  const int64_t from_left = corner(from, 1), to_left = corner(to, 1);
  const int64_t top = std::max<int64_t>(0, std::max(from_top, to_top));
  const int64_t bottom = std::min(extent.height, std::min(from_top + from_height, to_top + to_height));
  const int64_t left = std::max<int64_t>(0, std::max(from_left, to_left));
  const int64_t right = std::min(extent.width, std::min(from_left + from_width, to_left + to_width));
  if (left >= right) return;
  for (int64_t c = 0; c < extent.channels; ++c)
    for (int64_t y = top; y < bottom; ++y)
      f((c * from_height + y - from_top) * from_width + left - from_left,
        (c * to_height + y - to_top) * to_width + left - to_left, right - left);
}

template <typename T>
void relayout(const RelayoutArgs<T>& a) {
  const int64_t from_size = row_size(a.from, a.extent), to_size = row_size(a.to, a.extent);
  at::parallel_for(0, a.map.count, grain(to_size), [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q) {
      const T sign = q >= a.map.negative_from ? T(-1) : T(1);
      const T* rows = a.rows + source_of(a.map, q) * from_size;
      T* out = a.out + q * to_size;
      if (!a.accumulate) std::fill(out, out + to_size, T(0));
      for_shared_runs(a.from, a.to, a.extent, position_of(a.map, q), [&](int64_t i, int64_t o, int64_t length) {
        for (int64_t k = 0; k < length; ++k) out[o + k] += sign * rows[i + k];
      });
    }
  });
}

template <typename T>
void interleave(const InterleaveArgs<T>& a) {
  const int64_t size = a.height * a.width, phase = a.rows * a.columns;
  at::parallel_for(0, a.images, grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image)
      for (int64_t y = 0; y < a.height; ++y) {
        const int64_t row = (y + a.top) / a.stride_y, phase_y = (y + a.top) % a.stride_y;
        const T* in = a.in + (image * a.stride_y + phase_y) * a.stride_x * phase + row * a.columns;
        T* out = a.out + image * size + y * a.width;
        int64_t x = 0;
        if (a.stride_x == 2) {  // whole pairs at once
          if (a.left % 2 == 1) out[x++] = in[phase + a.left / 2];
          const T *even = in + (x + a.left) / 2, *odd = even + phase;
          for (int64_t pair = 0; pair < (a.width - x) / 2; ++pair) {
            out[x + 2 * pair] = even[pair];
            out[x + 2 * pair + 1] = odd[pair];
          }
          x += (a.width - x) / 2 * 2;
        }
        for (; x < a.width; ++x) out[x] = in[(x + a.left) % a.stride_x * phase + (x + a.left) / a.stride_x];
      }
  });
}

// ---- gradients ---------------------------------------------------------------------------------------------------
// Rows of one group add to the same gradients: a thread owns whole groups.

template <typename T>
inline void relax_backward_run(const RelaxBackwardArgs<T>& a, const T* rows, T sign, const T* grad_out, T grad_constant,
                               T* grad_rows, int64_t lower_at, int64_t at, int64_t index, int64_t n) {
  const bool has_lower = a.lower_intercept != nullptr, has_bias = a.bias != nullptr;
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const auto add = [&](T* to, const Lanes<T>& more)
                         PYCERT_INLINED { memory.store(to + k, memory.load(to + k) + more); };
    const Lanes<T> row = sign * memory.load(rows + k), zero{};
    Lanes<T> grad = memory.load(grad_out + k);
    if (has_bias) grad += grad_constant * memory.load(a.bias + index + k);
    const auto positive = row >= zero;
    if (grad_rows != nullptr) {
      const Lanes<T> low = memory.load(a.lower_slope + lower_at + k), high = memory.load(a.upper_slope + at + k);
      const Lanes<T> high_at = memory.load(a.upper_intercept + at + k);
      const Lanes<T> low_at = has_lower ? memory.load(a.lower_intercept + lower_at + k) : zero;
      memory.store(grad_rows + k, grad * (positive ? low : high) + grad_constant * (positive ? low_at : high_at));
    }
    const Lanes<T> slope = row * grad, intercept = row * grad_constant;
    if (a.grad_lower_slope != nullptr) add(a.grad_lower_slope + lower_at, positive ? slope : zero);
    if (a.grad_lower_intercept != nullptr) add(a.grad_lower_intercept + lower_at, positive ? intercept : zero);
    if (a.grad_upper_slope != nullptr) {
      add(a.grad_upper_slope + at, positive ? zero : slope);
      add(a.grad_upper_intercept + at, positive ? zero : intercept);
    }
  });
}

template <typename T>
void relax_backward(const RelaxBackwardArgs<T>& a) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  at::parallel_for(0, a.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = a.starts[begin]; i < a.starts[end]; ++i) {
      const int64_t q = a.order[i], base = a.map.sample[q] * n,
                    lower_base = a.lower_row == nullptr ? base : a.lower_row[q] * n;
      const T sign = q >= a.map.negative_from ? T(-1) : T(1);
      const T* rows = a.rows + source_of(a.map, q) * size;
      const T* grad_out = a.grad_out + q * size;
      const T grad_constant = T(a.grad_constant[q]);
      T* grad_rows = a.grad_rows == nullptr ? nullptr : a.grad_rows + q * size;
      for_runs(
          a.window, a.extent, position_of(a.map, q),
          [&](int64_t offset, int64_t index, int64_t length) PYCERT_INLINED {
            relax_backward_run(a, rows + offset, sign, grad_out + offset, grad_constant,
                               grad_rows == nullptr ? nullptr : grad_rows + offset, lower_base + index, base + index,
                               index, length);
          },
          [&](int64_t offset, int64_t length) {
            if (grad_rows != nullptr) std::fill(grad_rows + offset, grad_rows + offset + length, T(0));
          });
    }
  });
}

// All elements of a group at once; those whose slope is fixed have lowest = highest.
template <typename T>
void ascend(const AscendArgs<T>& a) {
  const Lanes<T> epsilon = a.epsilon - Lanes<T>{};
  at::parallel_for(0, a.groups, grain(4 * a.n), [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      T *slope = a.slope + g * a.n, *first = a.first + g * a.n, *second = a.second + g * a.n;
      T* best = a.improved[g] ? a.best + a.best_row[g] * a.n : nullptr;
      const T *grad = a.grad + g * a.n, *lowest = a.lowest + a.sample[g] * a.n,
              *highest = a.highest + a.sample[g] * a.n;
      for_lanes(a.n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
        const Lanes<T> at = memory.load(slope + k), up = memory.load(grad + k);
        if (best != nullptr) memory.store(best + k, at);
        const Lanes<T> m = a.first_decay * memory.load(first + k) + (T(1) - a.first_decay) * up;
        const Lanes<T> v = a.second_decay * memory.load(second + k) + (T(1) - a.second_decay) * up * up;
        memory.store(first + k, m);
        memory.store(second + k, v);
        const Lanes<T> next = at + a.rate * m / (root(v) * a.second_correction + epsilon);
        const Lanes<T> low = memory.load(lowest + k), high = memory.load(highest + k);
        const Lanes<T> capped = next < high ? next : high;  // NaN, of a gradient that overflowed: the highest
        memory.store(slope + k, capped < low ? low : capped);
      });
    }
  });
}

template <typename T>
inline double dual_norm_of_row(const ConcretizeBackwardArgs<T>& a, int64_t q) {
  const T* rows = a.rows + q * row_size(a.window, a.extent);
  Sums sums;
  for_runs(
      a.window, a.extent, position_of(a.map, q),
      [&](int64_t offset, int64_t index, int64_t length)
          PYCERT_INLINED { ball_run(rows + offset, T(1), a.centre + index, a.norm, length, sums); },
      [](int64_t, int64_t) {});
  return dual_norm<T>(sums, a.norm);
}

template <typename T>
inline void box_backward_run(const ConcretizeBackwardArgs<T>& a, const T* rows, T grad, T* grad_rows, int64_t at,
                             int64_t n) {
  for_lanes(n, [&](const auto& memory, int64_t k) PYCERT_INLINED {
    const auto add = [&](T* to, const Lanes<T>& more)
                         PYCERT_INLINED { memory.store(to + at + k, memory.load(to + at + k) + more); };
    const Lanes<T> row = memory.load(rows + k), zero{};
    const auto positive = row >= zero;
    const Lanes<T> lower = memory.load(a.lower + at + k), upper = memory.load(a.upper + at + k);
    memory.store(grad_rows + k, grad * least_end(row, lower, upper));
    if (a.grad_lower == nullptr) return;
    add(a.grad_lower, positive ? grad * row : zero);
    add(a.grad_upper, positive ? zero : grad * row);
  });
}

template <typename T>
void concretize_backward(const ConcretizeBackwardArgs<T>& a) {
  const int64_t size = row_size(a.window, a.extent), n = a.extent.numel();
  at::parallel_for(0, a.groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = a.starts[begin]; i < a.starts[end]; ++i) {
      const int64_t q = a.order[i], sample = a.map.sample[q], base = sample * n;
      const T* rows = a.rows + q * size;
      T* grad_rows = a.grad_rows + q * size;
      const T grad = T(a.grad_value[q]);
      const double norm = a.norm == 0 ? 0 : dual_norm_of_row(a, q);
      const T eps = a.norm == 0 ? T(0) : a.eps[sample];
      if (a.grad_eps != nullptr) a.grad_eps[sample] -= a.grad_value[q] * norm;
      bool first = true;  // p = 1: the subgradient of max |a| at its first maximiser
      for_runs(
          a.window, a.extent, position_of(a.map, q),
          [&](int64_t offset, int64_t index, int64_t length) PYCERT_INLINED {
            if (a.norm == 0) {
              box_backward_run(a, rows + offset, grad, grad_rows + offset, base + index, length);
              return;
            }
            for (int64_t k = 0; k < length; ++k) {
              const int64_t o = offset + k, at = base + index + k;
              const T row = rows[o];
              if (a.grad_centre != nullptr) a.grad_centre[at] += grad * row;
              T slope = 0;
              if (a.norm == 2) {
                slope = norm > 0 ? T(row / norm) : T(0);
              } else if (first && double(std::abs(row)) == norm) {
                slope = row >= T(0) ? T(1) : T(-1);
                first = false;
              }
              grad_rows[o] = grad * (a.centre[at] - eps * slope);
            }
          },
          [&](int64_t offset, int64_t length) { std::fill(grad_rows + offset, grad_rows + offset + length, T(0)); });
    }
  });
}

// Rows share table rows: a thread owns a share of the channels (or of a vector's elements) of all of them.
template <typename T>
void relayout_backward(const RelayoutBackwardArgs<T>& a) {
  const int64_t from_size = row_size(a.from, a.extent), to_size = row_size(a.to, a.extent);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t low = from_size * begin / threads, high = from_size * end / threads;
    for (int64_t q = 0; q < a.map.count; ++q) {
      const T sign = q >= a.map.negative_from ? T(-1) : T(1);
      T* grad_rows = a.grad_rows + source_of(a.map, q) * from_size;
      const T* grad_out = a.grad_out + q * to_size;
      for_shared_runs(a.from, a.to, a.extent, position_of(a.map, q), [&](int64_t i, int64_t o, int64_t length) {
        const int64_t first = std::max(i, low), last = std::min(i + length, high);
        for (int64_t k = first; k < last; ++k) grad_rows[k] += sign * grad_out[o + k - i];
      });
    }
  });
}
