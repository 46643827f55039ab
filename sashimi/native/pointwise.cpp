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

// Does each row, on any thread, given the place of the sum (n) that `each` of them share, which begins with zeros.
template <class Do> void for_rows(int64_t rows, int64_t n, int64_t each, int64_t threads, float* sums, Do row) {
#pragma omp parallel for num_threads(threads)
    for (int64_t first = 0; first < rows; first += each) {
        float* sum = sums ? sums + first / each * n : nullptr;
        if (sum) std::fill_n(sum, n, 0);
        for (int64_t r = first; r < std::min(first + each, rows); r++) row(r, sum);
    }
}

template <bool WHOLE>
void gelu_rows(int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables& tables, const float* x, const float* bias,
               float* y) {
    for_rows(rows, n, each, threads, nullptr, [&](int64_t r, float*) {
        for (int64_t i = 0; i < n; i += W)
            store<WHOLE>(gelu(load<WHOLE>(x + r * n, i, n) + load<WHOLE>(bias, i, n), tables), y + r * n, i, n);
    });
}

template <bool WHOLE>
void gelu_rows_back(int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables& tables, const float* x, const float* bias,
                    const float* d_y, float* d_x, float* sums) {
    for_rows(rows, n, each, threads, sums, [&](int64_t r, float* sum) {
        for (int64_t i = 0; i < n; i += W) {
            const V32 slope = gelu_slope(load<WHOLE>(x + r * n, i, n) + load<WHOLE>(bias, i, n), tables);
            const V32 d = load<WHOLE>(d_y + r * n, i, n) * slope;
            store<WHOLE>(d, d_x + r * n, i, n);
            if (sum) add<WHOLE>(d, sum, i, n);
        }
    });
}

template <bool WHOLE>
void glu_rows(int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables& tables, const float* x, const float* bias,
              float* y) {
    for_rows(rows, n, each, threads, nullptr, [&](int64_t r, float*) {
        const float* own = x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load<WHOLE>(own + n, i, n) + load<WHOLE>(bias + n, i, n), tables);
            store<WHOLE>((load<WHOLE>(own, i, n) + load<WHOLE>(bias, i, n)) * gate, y + r * n, i, n);
        }
    });
}

template <bool WHOLE>
void glu_rows_back(int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables& tables, const float* x, const float* bias,
                   const float* d_y, float* d_x, float* sums) {
    for_rows(rows, 2 * n, each, threads, sums, [&](int64_t r, float* sum) {
        const float* own = x + 2 * r * n;
        float* d_own = d_x + 2 * r * n;
        for (int64_t i = 0; i < n; i += W) {
            const V32 gate = sigmoid(load<WHOLE>(own + n, i, n) + load<WHOLE>(bias + n, i, n), tables);
            const V32 d = load<WHOLE>(d_y + r * n, i, n) * gate;
            const V32 d_gate = d * (load<WHOLE>(own, i, n) + load<WHOLE>(bias, i, n)) * (1 - gate);
            store<WHOLE>(d, d_own, i, n);
            store<WHOLE>(d_gate, d_own + n, i, n);
            if (!sum) continue;
            add<WHOLE>(d, sum, i, n);
            add<WHOLE>(d_gate, sum + n, i, n);
        }
    });
}

}  // namespace

#define FORWARD \
    int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables *tables, const float *x, const float *bias, float *y
#define BACKWARD \
    int64_t rows, int64_t n, int64_t each, int64_t threads, const Tables *tables, const float *x, const float *bias, \
        const float *d_y, float *d_x, float *sums

// y (rows, n) of x + bias: GELU's of (rows, n), GLU's of (rows, 2 n). Back, d_x as x, and unless null the sums of each
// `each` of its rows.
extern "C" {
void gelu_forward(FORWARD) { (n % W ? gelu_rows<false> : gelu_rows<true>)(rows, n, each, threads, *tables, x, bias, y); }
void glu_forward(FORWARD) { (n % W ? glu_rows<false> : glu_rows<true>)(rows, n, each, threads, *tables, x, bias, y); }
void gelu_backward(BACKWARD) {
    (n % W ? gelu_rows_back<false> : gelu_rows_back<true>)(rows, n, each, threads, *tables, x, bias, d_y, d_x, sums);
}
void glu_backward(BACKWARD) {
    (n % W ? glu_rows_back<false> : glu_rows_back<true>)(rows, n, each, threads, *tables, x, bias, d_y, d_x, sums);
}
}
