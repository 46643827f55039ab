// The samples of a SaShiMi model, one after another, on one CPU core: what library.py compiles and engine.py calls.
//
// A program of operations per phase of the pooling period runs on one memory of `units`, each a vector of W numbers of
// type T. With many clips a unit is one feature of W clips; with a single clip it is W features (the last ones padded
// with zeros). `weight` and `feature` hide which of the two it is: one of the factors of a product is a vector, the
// other one number for all. Written for gcc's and clang's vector extensions, so for any instruction set.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "activations.h"

namespace {

template <class T> struct Unit;
template <> struct Unit<float> { using V = V32; static constexpr int W = 16; };
template <> struct Unit<double> { using V = V64; static constexpr int W = 8; };

enum Code : int64_t { EMBED, NORM, STATE_SPACE, LINEAR, GLU, ADD, COPY, END };

// One operation. `in`, `out`, `more` are places in the memory, in units; `w` is a place in the parameters, in numbers.
struct Op { int64_t code, in, out, more, n_in, n_out, w, flag; };

template <class T, bool SINGLE> struct Machine {
    using V = typename Unit<T>::V;
    static constexpr int W = Unit<T>::W, LANES = SINGLE ? 1 : W;
    static constexpr int TILE = SINGLE ? 4 : 8;  // units of output that a product computes at once
    T* memory;
    const T* params;
    Tables tables;

    static int64_t units(int64_t n) { return SINGLE ? (n + W - 1) / W : n; }
    T* at(int64_t place) { return memory + place * W; }
    V& unit(int64_t place) { return *(V*)at(place); }
    static V feature(const T* x, int64_t i) {  // a factor that is a number of each clip
        if constexpr (SINGLE) return x[i] - V{};
        else return *(const V*)(x + i * W);
    }
    static V weight(const T* w) {  // a factor that is the same for all clips
        if constexpr (SINGLE) return *(const V*)w;
        else return *w - V{};
    }

    // out = W in + bias, then `flag`: 0 nothing, 1 GELU, 2 + more. Parameters: tiles of bias, then of W by column.
    void linear(const Op& op) {
        const T *x = at(op.in), *w = params + op.w;
        const int64_t outputs = units(op.n_out), step = SINGLE ? W : 1;
        for (int64_t first = 0; first < outputs; first += TILE) {
            V sum[TILE];
            for (int j = 0; j < TILE; j++, w += step) sum[j] = weight(w);
            for (int64_t i = 0; i < op.n_in; i++) {
                const V factor = feature(x, i);
                for (int j = 0; j < TILE; j++, w += step) sum[j] += weight(w) * factor;
            }
            const int64_t count = std::min<int64_t>(TILE, outputs - first);
            for (int j = 0; j < count; j++) {
                V y = sum[j];
                if (op.flag == 1) y = gelu(y, tables);
                if (op.flag == 2) y += unit(op.more + first + j);
                unit(op.out + first + j) = y;
            }
        }
    }

    // x' = rotate(decay, x) - a (b . x) + B u, y = GELU(C . x' + D u). The state is at `more`, real and imaginary parts of
    // a mode side by side; `flag` says that there are a and b. Parameters of a channel: D, then of each mode 10.
    void state_space(const Op& op) {
        const T *u = at(op.in), *w = params + op.w;
        const int64_t modes = op.n_out, channels = units(op.n_in), step = SINGLE ? W : 1;
        for (int64_t h = 0; h < channels; h++) {
            V* x = (V*)at(op.more + 2 * modes * h);
            const V input = *(const V*)(u + h * W);
            V y = weight(w) * input, dot = V{};
            w += step;
            if (op.flag)
                for (int64_t n = 0; n < modes; n++) {
                    const T* p = w + n * 10 * step;
                    dot += weight(p) * x[2 * n] + weight(p + step) * x[2 * n + 1];
                }
            for (int64_t n = 0; n < modes; n++) {
                const T* p = w + (n * 10 + 2) * step;
                const V re = x[2 * n], im = x[2 * n + 1], c = weight(p), s = weight(p + step);
                const V next_re = c * re - s * im - weight(p + 2 * step) * dot + weight(p + 4 * step) * input;
                const V next_im = c * im + s * re - weight(p + 3 * step) * dot + weight(p + 5 * step) * input;
                y += weight(p + 6 * step) * next_re + weight(p + 7 * step) * next_im;
                x[2 * n] = next_re;
                x[2 * n + 1] = next_im;
            }
            w += modes * 10 * step;
            unit(op.out + h) = gelu(y, tables);
        }
    }

    // LayerNorm (`flag` 0; parameters: epsilon, n factors, n shifts) or the original's (1; epsilon 0, s, m).
    void norm(const Op& op) {
        const T *x = at(op.in), *w = params + op.w;
        T* y = at(op.out);
        const int64_t n = op.n_in;
        T mean[LANES] = {}, square[LANES] = {}, scale[LANES];
        for (int64_t i = 0; i < n; i++)
            for (int l = 0; l < LANES; l++) mean[l] += x[i * LANES + l];
        for (int l = 0; l < LANES; l++) mean[l] /= n;
        for (int64_t i = 0; i < n; i++)
            for (int l = 0; l < LANES; l++) {
                const T d = x[i * LANES + l] - mean[l];
                square[l] += d * d;
            }
        for (int l = 0; l < LANES; l++) scale[l] = 1 / std::sqrt(square[l] / n + w[0]);
        for (int64_t i = 0; i < n; i++) {
            const T factor = op.flag ? w[1] : w[1 + i], shift = op.flag ? w[1] * w[2] : w[1 + n + i];
            for (int l = 0; l < LANES; l++) {
                const T d = (x[i * LANES + l] - mean[l]) * scale[l];
                y[i * LANES + l] = factor * d + (op.flag ? shift * scale[l] : shift);
            }
        }
    }

    void glu(const Op& op) {  // out = more + first half * sigmoid(second half)
        const int64_t n = units(op.n_out);
        for (int64_t i = 0; i < n; i++)
            unit(op.out + i) = unit(op.more + i) + unit(op.in + i) * sigmoid(unit(op.in + n + i), tables);
    }

    void add(const Op& op) {
        for (int64_t i = 0; i < units(op.n_out); i++) unit(op.out + i) = unit(op.in + i) + unit(op.more + i);
    }

    void embed(const Op& op, const int64_t* ids) {
        T* y = at(op.out);
        for (int l = 0; l < LANES; l++)
            for (int64_t i = 0; i < op.n_out; i++) y[i * LANES + l] = params[op.w + ids[l] * op.n_out + i];
    }

    // Runs one phase's program; returns the place of the logits.
    int64_t run(const Op* op, const int64_t* ids) {
        for (;; op++) switch (op->code) {
            case EMBED: embed(*op, ids); break;
            case NORM: norm(*op); break;
            case STATE_SPACE: state_space(*op); break;
            case LINEAR: linear(*op); break;
            case GLU: glu(*op); break;
            case ADD: add(*op); break;
            case COPY: std::memcpy(at(op->out), at(op->in), units(op->n_out) * W * sizeof(T)); break;
            default: return op->in;
        }
    }
};

struct Drawing { double temperature; int64_t top_k; double top_p; };  // top_k 0: all

// sampler.draw for one clip: an id, and its negative log-likelihood under the logits as they are, in nats.
int64_t draw(const std::vector<double>& logits, std::vector<double>& probs, double uniform, const Drawing& how,
             double& nats) {
    const int64_t levels = logits.size();
    const double top = *std::max_element(logits.begin(), logits.end());
    double sum = 0, own = 0;
    for (int64_t i = 0; i < levels; i++) own += probs[i] = std::exp(logits[i] - top);
    if (how.temperature == 1) sum = own;
    else
        for (int64_t i = 0; i < levels; i++) sum += probs[i] = std::exp((logits[i] - top) / how.temperature);
    for (double& p : probs) p /= sum;

    if (how.top_k || how.top_p < 1) {
        std::vector<int64_t> order(levels);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return probs[a] > probs[b]; });
        for (int64_t i = how.top_k ? how.top_k : levels; i < levels; i++) probs[order[i]] = 0;
        if (how.top_p < 1) {
            double total = 0, before = 0;
            for (int64_t i : order) total += probs[i];
            for (int64_t i : order) {
                const double p = probs[i];
                if (!(before < how.top_p * total)) probs[i] = 0;
                before += p;
            }
        }
    }
    // Integers, as in sampler.draw: monotone, and the same in any order.
    int64_t total = 0;
    for (double p : probs) total += int64_t(p * double(int64_t(1) << 52));
    const int64_t place = int64_t(uniform * double(total));
    int64_t id = 0, seen = 0;
    for (; id < levels - 1; id++) {
        seen += int64_t(probs[id] * double(int64_t(1) << 52));
        if (seen > place) break;
    }
    nats = std::log(own) - (logits[id] - top);
    return id;
}

}  // namespace

// `length` samples of `rows` clips (1, or at most W of them). programs: of phase 0, 1, …, `period` in all.
// ids (rows) in: the samples before; uniforms, out, nats (rows, length).
template <class T, bool SINGLE>
static void generate(const Op* const* programs, int64_t period, int64_t phase, T* memory, const T* params,
                     const Tables* tables, const Drawing* how, int64_t rows, int64_t levels, int64_t length,
                     const int64_t* ids, const double* uniforms, int64_t* out, double* nats) {
    Machine<T, SINGLE> machine{memory, params, *tables};
    constexpr int LANES = Machine<T, SINGLE>::LANES;
    int64_t last[LANES] = {};
    std::copy(ids, ids + rows, last);
    std::vector<double> logits(levels), probs(levels);
    for (int64_t t = 0; t < length; t++, phase = (phase + 1) % period) {
        const T* found = machine.at(machine.run(programs[phase], last));
        for (int64_t l = 0; l < rows; l++) {
            for (int64_t i = 0; i < levels; i++) logits[i] = found[i * LANES + l];
            last[l] = draw(logits, probs, uniforms[l * length + t], *how, nats[l * length + t]);
            out[l * length + t] = last[l];
        }
    }
}

#define ARGUMENTS(T) \
    const Op *const *programs, int64_t period, int64_t phase, T *memory, const T *params, const Tables *tables, \
        const Drawing *how, int64_t rows, int64_t levels, int64_t length, const int64_t *ids, \
        const double *uniforms, int64_t *out, double *nats
#define VALUES programs, period, phase, memory, params, tables, how, rows, levels, length, ids, uniforms, out, nats

extern "C" {
void single_float(ARGUMENTS(float)) { generate<float, true>(VALUES); }
void many_float(ARGUMENTS(float)) { generate<float, false>(VALUES); }
void single_double(ARGUMENTS(double)) { generate<double, true>(VALUES); }
void many_double(ARGUMENTS(double)) { generate<double, false>(VALUES); }
}
