// GELU and GLU of rows, to which a bias is added first, and back, when the bias's gradient is summed up on the way:
// what pointwise.py calls. In float32.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "activations.h"

namespace {

constexpr int64_t W = BYTES / sizeof(float);

// The numbers from `i` to `n`, a vector at most; the rest of it is zeros. WHOLE: n is a number of whole vectors.
template <bool WHOLE> V32 load(const float* x, int64_t i, int64_t n) {
    if (WHOLE || i + W <= n) return *(const V32*)(x + i);
    V32 v{};
    std::memcpy(&v, x + i, (n - i) * sizeof(float));
    return v;
}
template <bool WHOLE> void store(V32 v, float* x, int64_t i, int64_t n) {
    if (WHOLE || i + W <= n) *(V32*)(x + i) = v;
    else std::memcpy(x + i, &v, (n - i) * sizeof(float));
}
template <bool WHOLE> void add(V32 v, float* x, int64_t i, int64_t n) {
    store<WHOLE>(load<WHOLE>(x, i, n) + v, x, i, n);
}

// What each function is given: x and bias as pointwise.py has them, n numbers of a row of y.
struct Given {
    int64_t rows, n, each, threads;
    const Tables& tables;
    const float *x, *bias;
};

// Does each row, on any thread, given the place of the sum, of `width`, that `each` of them share; it begins with zeros.
template <class Do> void for_rows(const Given& g, int64_t width, float* sums, Do row) {
#pragma omp parallel for num_threads(g.threads)
    for (int64_t first = 0; first < g.rows; first += g.each) {
        float* sum = sums ? sums + first / g.each * width : nullptr;
        if (sum) std::fill_n(sum, width, 0);
        for (int64_t r = first; r < std::min(first + g.each, g.rows); r++) row(r, sum);
    }
}

template <bool WHOLE> void gelu_rows(const Given& g, float* y) {
    const int64_t n = g.n;
    for_rows(g, n, nullptr, [&](int64_t r, float*) {
        for (int64_t i = 0; i < n; i += W)
            store<WHOLE>(gelu(load<WHOLE>(g.x + r * n, i, n) + load<WHOLE>(g.bias, i, n), g.tables), y + r * n, i, n);
    });
}

template <bool WHOLE> void gelu_rows_back(const Given& g, const float* d_y, float* d_x, float* sums) {
    const int64_t n = g.n;
    for_rows(g, n, sums, [&](int64_t r, float* sum) {
        for (int64_t i = 0; i < n; i += W) {
            const V32 slope = gelu_slope(load<WHOLE>(g.x + r * n, i, n) + load<WHOLE>(g.bias, i, n), g.tables);
            const V32 d = load<WHOLE>(d_y + r * n, i, n) * slope;
            store<WHOLE>(d, d_x + r * n, i, n);
            if (sum) add<WHOLE>(d, sum, i, n);
        }
    });
}

template <bool WHOLE> void glu_rows(const Given& g, float* y) {
    const int64_t n = g.n;
    for_rows(g, n, nullptr, [&](int64_t r, float*) {
        const float* x = g.x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load<WHOLE>(x + n, i, n) + load<WHOLE>(g.bias + n, i, n), g.tables);
            store<WHOLE>((load<WHOLE>(x, i, n) + load<WHOLE>(g.bias, i, n)) * gate, y + r * n, i, n);
        }
    });
}

template <bool WHOLE> void glu_rows_back(const Given& g, const float* d_y, float* d_x, float* sums) {
    const int64_t n = g.n;
    for_rows(g, 2 * n, sums, [&](int64_t r, float* sum) {
        const float* x = g.x + 2 * r * n;
        float* d = d_x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load<WHOLE>(x + n, i, n) + load<WHOLE>(g.bias + n, i, n), g.tables);
            const V32 d_value = load<WHOLE>(d_y + r * n, i, n) * gate;
            const V32 d_gate = d_value * (load<WHOLE>(x, i, n) + load<WHOLE>(g.bias, i, n)) * (1 - gate);
            store<WHOLE>(d_value, d, i, n);
            store<WHOLE>(d_gate, d + n, i, n);
            if (!sum) continue;
            add<WHOLE>(d_value, sum, i, n);
            add<WHOLE>(d_gate, sum + n, i, n);
        }
    });
}

}  // namespace

#define ARGUMENTS \
    int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables *tables, const float *x, const float *bias
#define GIVEN {rows, n, each, threads, *tables, x, bias}

// y (rows, n) of x + bias: GELU's of (rows, n), GLU's of (rows, 2 n). Back, d_x as x, and the sums of its rows, or null.
extern "C" {
void gelu_forward(ARGUMENTS, float* y) { (n % W ? gelu_rows<false> : gelu_rows<true>)(GIVEN, y); }
void glu_forward(ARGUMENTS, float* y) { (n % W ? glu_rows<false> : glu_rows<true>)(GIVEN, y); }
void gelu_backward(ARGUMENTS, const float* d_y, float* d_x, float* sums) {
    (n % W ? gelu_rows_back<false> : gelu_rows_back<true>)(GIVEN, d_y, d_x, sums);
}
void glu_backward(ARGUMENTS, const float* d_y, float* d_x, float* sums) {
    (n % W ? glu_rows_back<false> : glu_rows_back<true>)(GIVEN, d_y, d_x, sums);
}
}
