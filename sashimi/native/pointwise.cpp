// GELU and GLU of rows, to which a bias is added first, and back, when the bias's gradient is summed up on the way:
// what pointwise.py calls. In float32.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.h"

namespace {

constexpr int64_t W = BYTES / sizeof(float);
constexpr int64_t ROWS = 64;  // whose part of the bias's gradient is summed up by itself

// The numbers from `i` to `n`, a vector at most; the rest of it is zeros.
inline V32 load(const float* x, int64_t i, int64_t n) {
    if (i + W <= n) return *(const V32*)(x + i);
    V32 v{};
    std::memcpy(&v, x + i, (n - i) * sizeof(float));
    return v;
}
inline void store(V32 v, float* x, int64_t i, int64_t n) {
    if (i + W <= n) *(V32*)(x + i) = v;
    else std::memcpy(x + i, &v, (n - i) * sizeof(float));
}
inline void add(V32 v, float* x, int64_t i, int64_t n) { store(load(x, i, n) + v, x, i, n); }

// Does each row, on any thread, given the place of its own sum (n), which begins with zeros.
template <class Do> void for_rows(int64_t rows, int64_t n, int64_t threads, float* sums, Do row) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += ROWS) {
        float* sum = sums ? sums + first / ROWS * n : nullptr;
        if (sum) std::fill_n(sum, n, 0);
        for (int64_t r = first; r < std::min(first + ROWS, rows); r++) row(r, sum);
    }
}

}  // namespace

extern "C" {

// x (rows, n), bias (n) -> y (rows, n).
void gelu_forward(int64_t rows, int64_t n, int64_t threads, const Tables* tables, const float* x, const float* bias,
                  float* y) {
    for_rows(rows, n, threads, nullptr, [=](int64_t r, float*) {
        for (int64_t i = 0; i < n; i += W)
            store(gelu(load(x + r * n, i, n) + load(bias, i, n), *tables), y + r * n, i, n);
    });
}

// And d_y (rows, n) -> d_x (rows, n) and the sums of each ROWS of them, (rows / ROWS, n).
void gelu_backward(int64_t rows, int64_t n, int64_t threads, const Tables* tables, const float* x, const float* bias,
                   const float* d_y, float* d_x, float* sums) {
    for_rows(rows, n, threads, sums, [=](int64_t r, float* sum) {
        for (int64_t i = 0; i < n; i += W) {
            const V32 slope = gelu_slope(load(x + r * n, i, n) + load(bias, i, n), *tables);
            const V32 d = load(d_y + r * n, i, n) * slope;
            store(d, d_x + r * n, i, n);
            add(d, sum, i, n);
        }
    });
}

// x (rows, 2 n), bias (2 n) -> y (rows, n).
void glu_forward(int64_t rows, int64_t n, int64_t threads, const Tables* tables, const float* x, const float* bias,
                 float* y) {
    for_rows(rows, n, threads, nullptr, [=](int64_t r, float*) {
        const float* own = x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load(own + n, i, n) + load(bias + n, i, n), *tables);
            store((load(own, i, n) + load(bias, i, n)) * gate, y + r * n, i, n);
        }
    });
}

// And d_y (rows, n) -> d_x (rows, 2 n) and the sums of each ROWS of them, (rows / ROWS, 2 n).
void glu_backward(int64_t rows, int64_t n, int64_t threads, const Tables* tables, const float* x, const float* bias,
                  const float* d_y, float* d_x, float* sums) {
    for_rows(rows, 2 * n, threads, sums, [=](int64_t r, float* sum) {
        const float* own = x + 2 * r * n;
        float* d_own = d_x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load(own + n, i, n) + load(bias + n, i, n), *tables);
            const V32 d = load(d_y + r * n, i, n) * gate;
            const V32 d_gate = d * (load(own, i, n) + load(bias, i, n)) * (1 - gate);
            store(d, d_own, i, n);
            store(d_gate, d_own + n, i, n);
            add(d, sum, i, n);
            add(d_gate, sum + n, i, n);
        }
    });
}
}
