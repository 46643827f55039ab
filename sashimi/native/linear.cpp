// Linear layers over rows, with GELU before and GLU after where they are asked for, and back: what linear.py calls.
//
// Rows are taken a block at a time, so that what comes between the activations and the products stays in the nearer
// caches: only x, y, the gradients of both, and what GLU is taken of are read from memory or written to it.
//
// Shapes: R rows, K numbers of each before the layer and N after, before GLU; K, N, and with GLU N/2, are whole vectors.
// In float32. All tensors but h and d_y begin where a line of the cache does.

#include <omp.h>

#include "activations.h"
#include "products.h"

namespace {

constexpr int64_t BLOCK = 96;  // rows at a time
constexpr int64_t PANEL = 64;  // columns of a product at a time
constexpr int64_t W = sizeof(V32) / sizeof(float);

V32& vec(float* x) { return *(V32*)x; }
const V32& vec(const float* x) { return *(const V32*)x; }

// C (m, n) = A B + plus, as `multiply` has it, by panels of B, which stay in a near cache for all rows. Of C, if it
// is not added to, the rows are fetched while they are computed: they come from memory, though only to be written.
void by_panels(int64_t m, int64_t n, int64_t k, const float* A, int64_t row, int64_t col, const float* B, float* C,
               const float* plus, int64_t ldp) {
    for (int64_t j = 0; j < n; j += PANEL)
        for (int64_t i = 0; i < m; i += ROWS) {
            const int64_t rows = std::min<int64_t>(ROWS, m - i), columns = std::min(PANEL, n - j);
            float* out = C + i * n + j;
            for (int64_t r = 0; plus != C && r < rows; r++)
                for (int64_t c = 0; c < columns; c += W) __builtin_prefetch(out + r * n + c, 1);
            multiply<float>(rows, columns, k, A + i * row, row, col, B + j, n, out, n,
                            plus ? plus + i * ldp + j : nullptr, ldp);
        }
}

struct Layer {
    int64_t R, K, N, threads, is_gelu, is_glu, part;
    const Tables& tables;
    float* memory;  // (threads, BLOCK, 2 K + N)

    float* own() const { return memory + omp_get_thread_num() * BLOCK * (2 * K + N); }

    // What the products take of x (m, K): itself, or its GELU, which is in this thread's memory then. BACK: and GELU's
    // slope, as many numbers further.
    template <bool BACK> const float* input(int64_t m, const float* x) const {
        if (!is_gelu) return x;
        float* y = own();
        for (int64_t i = 0; i < m * K; i += W) {
            const Gelu at_x = gelu_and_slope(vec(x + i), tables);
            vec(y + i) = at_x.value;
            if (BACK) vec(y + BLOCK * K + i) = at_x.slope;
        }
        return y;
    }

    // The gradient of what GLU is taken of, h (m, N), from d_y (m, N/2); or d_y, if it is not taken.
    const float* output_gradient(int64_t m, const float* h, const float* d_y) const {
        if (!is_glu) return d_y;
        float *first = own() + 2 * BLOCK * K, *d = first;
        for (int64_t r = 0; r < m; r++, h += N, d += N, d_y += N / 2)
            for (int64_t i = 0; i < N / 2; i += W) {
                const V32 gate = sigmoid(vec(h + N / 2 + i), tables), d_value = vec(d_y + i) * gate;
                vec(d + i) = d_value;
                vec(d + N / 2 + i) = d_value * vec(h + i) * (1 - gate);
            }
        return first;
    }

    // y (R, N), or h (R, N) and its GLU y (R, N/2), from x (R, K), weight (N, K), whose transpose is put into weight_T,
    // and bias (N).
    void forward(const float* x, const float* weight, const float* bias, float* weight_T, float* h, float* y) const {
        transpose(weight, N, K, K, weight_T, N);
#pragma omp parallel for num_threads(threads)
        for (int64_t first = 0; first < R; first += BLOCK) {
            const int64_t m = std::min(BLOCK, R - first);
            float *out = (is_glu ? h : y) + first * N, *gated = y + first * N / 2;
            by_panels(m, N, K, input<false>(m, x + first * K), K, 1, weight_T, out, bias, 0);
            for (int64_t r = 0; is_glu && r < m; r++, out += N, gated += N / 2)
                for (int64_t i = 0; i < N / 2; i += W)
                    vec(gated + i) = vec(out + i) * sigmoid(vec(out + N / 2 + i), tables);
        }
    }

    // d_x (R, K), d_weight (N, K) and d_bias (N), from what forward had and d_y. Each `part` rows sum up the last two by
    // themselves, in sums (parts, N (K + 1)), so that their order does not depend on the threads.
    void backward(const float* x, const float* weight, const float* h, const float* d_y, float* sums, float* d_x,
                  float* d_weight, float* d_bias) const {
        const int64_t parts = (R + part - 1) / part, size = N * (K + 1);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(dynamic)
            for (int64_t p = 0; p < parts; p++) {
                float *weight_sum = sums + p * size, *bias_sum = weight_sum + N * K;
                std::fill_n(weight_sum, size, 0);
                for (int64_t first = p * part, end = std::min(first + part, R); first < end; first += BLOCK) {
                    const int64_t m = std::min(BLOCK, end - first);
                    const float* d = output_gradient(m, h + first * N, d_y + first * (is_glu ? N / 2 : N));
                    for (int64_t r = 0; r < m; r++)
                        for (int64_t i = 0; i < N; i += W) vec(bias_sum + i) += vec(d + r * N + i);
                    by_panels(N, K, m, d, 1, N, input<true>(m, x + first * K), weight_sum, weight_sum, K);
                    by_panels(m, K, N, d, N, 1, weight, d_x + first * K, nullptr, 0);
                    for (int64_t i = 0; is_gelu && i < m * K; i += W)
                        vec(d_x + first * K + i) *= vec(own() + BLOCK * K + i);
                }
            }
#pragma omp for
            for (int64_t i = 0; i < size; i += W) {
                V32 sum{};
                for (int64_t p = 0; p < parts; p++) sum += vec(sums + p * size + i);
                vec(i < N * K ? d_weight + i : d_bias + i - N * K) = sum;
            }
        }
    }
};

}  // namespace

#define LAYER                                                                                        \
    int64_t R, int64_t K, int64_t N, int64_t threads, int64_t is_gelu, int64_t is_glu, int64_t part, \
        const Tables *tables, float *memory, const float *x, const float *weight
#define GIVEN {R, K, N, threads, is_gelu, is_glu, part, *tables, memory}

extern "C" {
int64_t block() { return BLOCK; }
void forward(LAYER, const float* bias, float* weight_T, float* h, float* y) {
    Layer GIVEN.forward(x, weight, bias, weight_T, h, y);
}
void backward(LAYER, const float* h, const float* d_y, float* sums, float* d_x, float* d_weight, float* d_bias) {
    Layer GIVEN.backward(x, weight, h, d_y, sums, d_x, d_weight, d_bias);
}
}
