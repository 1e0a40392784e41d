// Row by row and number by number: norm, rotation, gated activation, writes into the cache, dropout, the optimizer's update.
#include "device.cuh"

// The columns of a row that a thread has, eight at a time where rows lie on multiples of 16 bytes. eight(first column), one(column).
template <class Eight, class One> __device__ inline void columns(int c, int vectors, Eight eight, One one) {
    const int whole = vectors ? c / 8 * 8 : 0;
    for (int at = 8 * threadIdx.x; at < whole; at += 8 * blockDim.x) eight(at);
    for (int at = whole + threadIdx.x; at < c; at += blockDim.x) one(at);
}

// y = x / sqrt(mean(x²) + eps) · weight, one block a row. x, y: (rows, c); weight: (c), f32.
template <class T> __device__ void rms_norm(const T *x, const float *weight, float eps, int c, int vectors, T *y) {
    SHARED(bytes);
    const T *row = x + static_cast<int64_t>(blockIdx.x) * c;
    T *out = y + static_cast<int64_t>(blockIdx.x) * c;
    float squares = 0;
    columns(c, vectors, [&](int first) {
        float values[8];
        read<8>(row + first, values);
#pragma unroll
        for (int at = 0; at < 8; at++) squares += values[at] * values[at];
    }, [&](int at) { squares += to_float(row[at]) * to_float(row[at]); });
    const float scale = rsqrtf(block_sum(squares, reinterpret_cast<float *>(bytes)) / c + eps);
    columns(c, vectors, [&](int first) {
        float values[8], weights[8];
        read<8>(row + first, values);
        read<8>(weight + first, weights);
#pragma unroll
        for (int at = 0; at < 8; at++) values[at] *= scale * weights[at];
        put(out + first, values);
    }, [&](int at) { out[at] = from_float<T>(to_float(row[at]) * (scale * weight[at])); });
}

// dx = before + scale · (w·dy − x · scale² · Σ(x·w·dy)/c), one block a row; `before` may be null.
template <class T>
__device__ void rms_norm_backward(const T *x, const float *weight, const T *dy, const T *before, float eps, int c, int vectors, T *dx) {
    SHARED(bytes);
    float *scratch = reinterpret_cast<float *>(bytes);
    const int64_t start = static_cast<int64_t>(blockIdx.x) * c;
    float squares = 0, along = 0;
    auto meet = [&](float value, float weight, float pulled) {
        squares += value * value;
        along += value * weight * pulled;
    };
    columns(c, vectors, [&](int first) {
        float values[8], weights[8], pulled[8];
        read<8>(x + start + first, values), read<8>(weight + first, weights), read<8>(dy + start + first, pulled);
#pragma unroll
        for (int at = 0; at < 8; at++) meet(values[at], weights[at], pulled[at]);
    }, [&](int at) { meet(to_float(x[start + at]), weight[at], to_float(dy[start + at])); });
    const float scale = rsqrtf(block_sum(squares, scratch) / c + eps);
    const float pull = block_sum(along, scratch) * scale * scale / c;
    auto slope = [&](float value, float weight, float pulled) { return scale * (weight * pulled - value * pull); };
    columns(c, vectors, [&](int first) {
        float values[8], weights[8], pulled[8], sums[8] = {};
        read<8>(x + start + first, values), read<8>(weight + first, weights), read<8>(dy + start + first, pulled);
        if (before) read<8>(before + start + first, sums);
#pragma unroll
        for (int at = 0; at < 8; at++) sums[at] += slope(values[at], weights[at], pulled[at]);
        put(dx + start + first, sums);
    }, [&](int at) {
        const float sum = before ? to_float(before[start + at]) : 0.0f;
        dx[start + at] = from_float<T>(sum + slope(to_float(x[start + at]), weight[at], to_float(dy[start + at])));
    });
}

// Rotates pairs (i, i + d/2); sign −1 rotates back. x, y: (n, h, d); cos, sin: (n, d/2), f32. A thread has eight pairs; with `vectors`
// d/2 is a multiple of eight, and they are of one head.
template <class T>
__device__ void rope(const T *x, const float *cos, const float *sin, float sign, int64_t pairs, int h, int half, int vectors, T *y) {
    auto place = [&](int64_t pair, int64_t &angle) {
        const int64_t head = pair / half, at = pair % half;
        angle = head / h * half + at;
        return head * 2 * half + at;
    };
    each_of(pairs, vectors, [&](int64_t pair) {
        int64_t angle;
        const int64_t left = place(pair, angle);
        float a[8], b[8], c[8], s[8], first[8], second[8];
        read<8>(x + left, a), read<8>(x + left + half, b), read<8>(cos + angle, c), read<8>(sin + angle, s);
#pragma unroll
        for (int at = 0; at < 8; at++) {
            first[at] = a[at] * c[at] - b[at] * (sign * s[at]);
            second[at] = b[at] * c[at] + a[at] * (sign * s[at]);
        }
        put(y + left, first), put(y + left + half, second);
    }, [&](int64_t pair) {
        int64_t angle;
        const int64_t left = place(pair, angle), right = left + half;
        const float a = to_float(x[left]), b = to_float(x[right]), c = cos[angle], s = sign * sin[angle];
        y[left] = from_float<T>(a * c - b * s);
        y[right] = from_float<T>(b * c + a * s);
    });
}

// y = a + b; y may be either.
template <class T> __device__ void sum(const T *a, const T *b, int64_t count, int vectors, T *y) {
    each_of(count, vectors, [&](int64_t first) {
        float left[8], right[8];
        read<8>(a + first, left), read<8>(b + first, right);
#pragma unroll
        for (int at = 0; at < 8; at++) left[at] += right[at];
        put(y + first, left);
    }, [&](int64_t at) { y[at] = from_float<T>(to_float(a[at]) + to_float(b[at])); });
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

template <class T> __device__ void gated(const T *gate, const T *up, int activation, int64_t count, int vectors, T *out) {
    auto number = [&](float gate, float up) {
        float value, slope;
        activate(activation, gate, value, slope);
        return value * up;
    };
    each_of(count, vectors, [&](int64_t first) {
        float gates[8], ups[8];
        read<8>(gate + first, gates), read<8>(up + first, ups);
#pragma unroll
        for (int at = 0; at < 8; at++) gates[at] = number(gates[at], ups[at]);
        put(out + first, gates);
    }, [&](int64_t at) { out[at] = from_float<T>(number(to_float(gate[at]), to_float(up[at]))); });
}

template <class T>
__device__ void gated_backward(
    const T *gate, const T *up, const T *dout, int activation, int64_t count, int vectors, T *dgate, T *dup) {
    // The gate becomes its gradient, and so does what it gates.
    auto number = [&](float &gate, float &up, float pull) {
        float value, slope;
        activate(activation, gate, value, slope);
        gate = pull * up * slope;
        up = pull * value;
    };
    each_of(count, vectors, [&](int64_t first) {
        float gates[8], ups[8], pulls[8];
        read<8>(gate + first, gates), read<8>(up + first, ups), read<8>(dout + first, pulls);
#pragma unroll
        for (int at = 0; at < 8; at++) number(gates[at], ups[at], pulls[at]);
        put(dgate + first, gates), put(dup + first, ups);
    }, [&](int64_t at) {
        float own = to_float(gate[at]), gated = to_float(up[at]);
        number(own, gated, to_float(dout[at]));
        dgate[at] = from_float<T>(own), dup[at] = from_float<T>(gated);
    });
}

// Rows of k and v, (n, width), to their slots of the caches, (slots, width); with `vectors` width is a multiple of eight.
template <class T>
__device__ void kv_write(
    const T *k, const T *v, const uint32_t *slots, int64_t count, int width, int vectors, T *k_cache, T *v_cache) {
    auto place = [&](int64_t at) { return static_cast<int64_t>(slots[at / width]) * width + at % width; };
    each_of(count, vectors, [&](int64_t first) {
        const int64_t to = place(first);
        float numbers[8], others[8];
        read<8>(k + first, numbers), read<8>(v + first, others);
        put(k_cache + to, numbers), put(v_cache + to, others);
    }, [&](int64_t at) {
        const int64_t to = place(at);
        k_cache[to] = k[at], v_cache[to] = v[at];
    });
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
    begin();
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
    extern "C" __global__ void rms_norm_##T(const T *x, const float *weight, float eps, int c, int vectors, T *y) { \
        begin(); \
        rms_norm<T>(x, weight, eps, c, vectors, y); \
    } \
    extern "C" __global__ void rms_norm_backward_##T( \
        const T *x, const float *weight, const T *dy, const T *before, float eps, int c, int vectors, T *dx) { \
        begin(); \
        rms_norm_backward<T>(x, weight, dy, before, eps, c, vectors, dx); \
    } \
    extern "C" __global__ void rope_##T( \
        const T *x, const float *cos, const float *sin, float sign, int64_t pairs, int h, int half, int vectors, T *y) { \
        begin(); \
        rope<T>(x, cos, sin, sign, pairs, h, half, vectors, y); \
    } \
    extern "C" __global__ void sum_##T(const T *a, const T *b, int64_t count, int vectors, T *y) { begin(); sum<T>(a, b, count, vectors, y); } \
    extern "C" __global__ void gated_##T(const T *gate, const T *up, int activation, int64_t count, int vectors, T *out) { \
        begin(); \
        gated<T>(gate, up, activation, count, vectors, out); \
    } \
    extern "C" __global__ void gated_backward_##T( \
        const T *gate, const T *up, const T *dout, int activation, int64_t count, int vectors, T *dgate, T *dup) { \
        begin(); \
        gated_backward<T>(gate, up, dout, activation, count, vectors, dgate, dup); \
    } \
    extern "C" __global__ void kv_write_##T( \
        const T *k, const T *v, const uint32_t *slots, int64_t count, int width, int vectors, T *k_cache, T *v_cache) { \
        begin(); \
        kv_write<T>(k, v, slots, count, width, vectors, k_cache, v_cache); \
    } \
    extern "C" __global__ void dropout_##T(const T *x, Whole state, Whole limit, float keep, int64_t count, T *y) { \
        begin(); \
        dropout<T>(x, state, limit, keep, count, y); \
    }
ROWS(float)
ROWS(bf16)
