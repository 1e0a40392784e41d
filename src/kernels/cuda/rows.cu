// Row by row and number by number: norm, rotation, gated activation, writes into the cache, dropout, the optimizer's update.
#include "device.cuh"

// y = x / sqrt(mean(x²) + eps) · weight, one block a row. x, y: (rows, c); weight: (c), f32.
template <class T> __device__ void rms_norm(const T *x, const float *weight, float eps, int c, T *y) {
    SHARED(bytes);
    const T *row = x + static_cast<int64_t>(blockIdx.x) * c;
    float squares = 0;
    for (int at = threadIdx.x; at < c; at += blockDim.x) squares += to_float(row[at]) * to_float(row[at]);
    float scale = rsqrtf(block_sum(squares, reinterpret_cast<float *>(bytes)) / c + eps);
    T *out = y + static_cast<int64_t>(blockIdx.x) * c;
    for (int at = threadIdx.x; at < c; at += blockDim.x) out[at] = from_float<T>(to_float(row[at]) * scale * weight[at]);
}

// dx = scale · (w·dy − x · scale² · Σ(x·w·dy)/c), one block a row.
template <class T>
__device__ void rms_norm_backward(const T *x, const float *weight, const T *dy, float eps, int c, T *dx) {
    SHARED(bytes);
    float *scratch = reinterpret_cast<float *>(bytes);
    int64_t first = static_cast<int64_t>(blockIdx.x) * c;
    float squares = 0, along = 0;
    for (int at = threadIdx.x; at < c; at += blockDim.x) {
        float value = to_float(x[first + at]);
        squares += value * value;
        along += value * weight[at] * to_float(dy[first + at]);
    }
    float scale = rsqrtf(block_sum(squares, scratch) / c + eps);
    float pull = block_sum(along, scratch) * scale * scale / c;
    for (int at = threadIdx.x; at < c; at += blockDim.x) {
        float value = to_float(x[first + at]);
        dx[first + at] = from_float<T>(scale * (weight[at] * to_float(dy[first + at]) - value * pull));
    }
}

// Rotates pairs (i, i + d/2); sign −1 rotates back. x, y: (n, h, d); cos, sin: (n, d/2), f32. One thread a pair.
template <class T>
__device__ void rope(const T *x, const float *cos, const float *sin, float sign, int64_t pairs, int h, int half, T *y) {
    int64_t pair = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (pair >= pairs) return;
    int at = pair % half;
    int64_t head = pair / half;
    int64_t angle = head / h * half + at, left = head * 2 * half + at, right = left + half;
    float a = to_float(x[left]), b = to_float(x[right]), c = cos[angle], s = sign * sin[angle];
    y[left] = from_float<T>(a * c - b * s);
    y[right] = from_float<T>(b * c + a * s);
}

// The activation at x and its slope there: SiLU (0) or GELU by tanh (1).
__device__ inline void activate(int activation, float x, float &value, float &slope) {
    if (activation == 0) {
        float sigmoid = 1.0f / (1.0f + __expf(-x));
        value = x * sigmoid;
        slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
        return;
    }
    const float root = 0.7978846f, cubic = 0.044715f; // √(2/π)
    float tanh = 1.0f - 2.0f / (1.0f + __expf(2.0f * root * (x + cubic * x * x * x)));
    value = 0.5f * x * (1.0f + tanh);
    slope = 0.5f * (1.0f + tanh) + 0.5f * x * (1.0f - tanh * tanh) * root * (1.0f + 3.0f * cubic * x * x);
}

template <class T> __device__ void gated(const T *gate, const T *up, int activation, int64_t count, T *out) {
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float value, slope;
    activate(activation, to_float(gate[at]), value, slope);
    out[at] = from_float<T>(value * to_float(up[at]));
}

template <class T>
__device__ void gated_backward(const T *gate, const T *up, const T *dout, int activation, int64_t count, T *dgate, T *dup) {
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float value, slope, pull = to_float(dout[at]);
    activate(activation, to_float(gate[at]), value, slope);
    dgate[at] = from_float<T>(pull * to_float(up[at]) * slope);
    dup[at] = from_float<T>(pull * value);
}

// Rows of k and v, (n, width), to their slots of the caches, (slots, width). One thread a number of both.
template <class T>
__device__ void kv_write(const T *k, const T *v, const uint32_t *slots, int64_t count, int width, T *k_cache, T *v_cache) {
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    int64_t to = static_cast<int64_t>(slots[at / width]) * width + at % width;
    k_cache[to] = k[at];
    v_cache[to] = v[at];
}

// SplitMix64's finalizer; the CPU's dropout has the same.
__device__ inline Whole mixed(Whole value) {
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ull;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebull;
    return value ^ (value >> 31);
}

// y = x · keep, or 0 where the upper half of what a place mixes to is below `limit`. One thread a number.
template <class T> __device__ void dropout(const T *x, Whole state, Whole limit, float keep, int64_t count, T *y) {
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    bool dropped = mixed(state + static_cast<Whole>(at) * 0x9e3779b97f4a7c15ull) >> 32 < limit;
    y[at] = from_float<T>(dropped ? 0.0f : to_float(x[at]) * keep);
}

// One update of AdamW: gradient, parameter and both moments of `count` numbers. One thread a number.
extern "C" __global__ void adamw_float(
    const float *gradient, float scale, float keep1, float take1, float keep2, float take2, float inverse_root, float eps, float step_size, float left, int64_t count,
    float *parameter, float *first, float *second) {
    int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= count) return;
    float pull = gradient[at] * scale;
    float m = first[at] * keep1 + pull * take1;
    float v = second[at] * keep2 + pull * pull * take2;
    first[at] = m;
    second[at] = v;
    parameter[at] = parameter[at] * left - m / (sqrtf(v) * inverse_root + eps) * step_size;
}

#define ROWS(T) \
    extern "C" __global__ void rms_norm_##T(const T *x, const float *weight, float eps, int c, T *y) { \
        rms_norm<T>(x, weight, eps, c, y); \
    } \
    extern "C" __global__ void rms_norm_backward_##T(const T *x, const float *weight, const T *dy, float eps, int c, T *dx) { \
        rms_norm_backward<T>(x, weight, dy, eps, c, dx); \
    } \
    extern "C" __global__ void rope_##T(const T *x, const float *cos, const float *sin, float sign, int64_t pairs, int h, int half, T *y) { \
        rope<T>(x, cos, sin, sign, pairs, h, half, y); \
    } \
    extern "C" __global__ void gated_##T(const T *gate, const T *up, int activation, int64_t count, T *out) { \
        gated<T>(gate, up, activation, count, out); \
    } \
    extern "C" __global__ void gated_backward_##T(const T *gate, const T *up, const T *dout, int activation, int64_t count, T *dgate, T *dup) { \
        gated_backward<T>(gate, up, dout, activation, count, dgate, dup); \
    } \
    extern "C" __global__ void kv_write_##T(const T *k, const T *v, const uint32_t *slots, int64_t count, int width, T *k_cache, T *v_cache) { \
        kv_write<T>(k, v, slots, count, width, k_cache, v_cache); \
    } \
    extern "C" __global__ void dropout_##T(const T *x, Whole state, Whole limit, float keep, int64_t count, T *y) { \
        dropout<T>(x, state, limit, keep, count, y); \
    }
ROWS(float)
ROWS(bf16)
