// The head's pieces: rows of logits to log-probabilities of targets and their gradient in place.
#include "device.cuh"

// log softmax(row)[target], f32, one block a row; with `wanted` the logits become onehot(target) − softmax. logits: (rows, v); with
// `vectors` v is a multiple of eight and rows lie on multiples of 16 bytes.
template <class T>
__device__ void token_logprobs(T *logits, const uint32_t *targets, int64_t v, int wanted, int vectors, float *logprobs) {
    SHARED(bytes);
    float *scratch = reinterpret_cast<float *>(bytes);
    T *row = logits + static_cast<int64_t>(blockIdx.x) * v;
    const int64_t target = targets[blockIdx.x], whole = vectors ? v : 0;
    float most = -INFINITY, sum = 0;
    auto raise = [&](float logit) {
        if (logit <= most) return;
        sum *= __expf(most - logit);
        most = logit;
    };
    auto add = [&](float logit) { sum += logit > -INFINITY ? __expf(logit - most) : 0.0f; };
    for (int64_t first = 8 * threadIdx.x; first < whole; first += 8 * blockDim.x) {
        float values[8], largest = -INFINITY;
        read<8>(row + first, values);
#pragma unroll
        for (int at = 0; at < 8; at++) largest = fmaxf(largest, values[at]);
        raise(largest);
#pragma unroll
        for (int at = 0; at < 8; at++) add(values[at]);
    }
    for (int64_t at = whole + threadIdx.x; at < v; at += blockDim.x) {
        raise(to_float(row[at]));
        add(to_float(row[at]));
    }
    const float largest = block_max(most, scratch);
    const float total = block_sum(most > -INFINITY ? sum * __expf(most - largest) : 0.0f, scratch);
    const float aim = to_float(row[target]);
    // Everyone has read the target before it is overwritten.
    __syncthreads();
    if (threadIdx.x == 0) logprobs[blockIdx.x] = aim - largest - logf(total);
    if (!wanted) return;
    const float scale = 1.0f / total;
    auto slope = [&](float logit, int64_t at) { return (at == target ? 1.0f : 0.0f) - __expf(logit - largest) * scale; };
    for (int64_t first = 8 * threadIdx.x; first < whole; first += 8 * blockDim.x) {
        float values[8];
        read<8>(row + first, values);
#pragma unroll
        for (int at = 0; at < 8; at++) values[at] = slope(values[at], first + at);
        put(row + first, values);
    }
    for (int64_t at = whole + threadIdx.x; at < v; at += blockDim.x) row[at] = from_float<T>(slope(to_float(row[at]), at));
}

// Rows times a number each. x, y: (rows, c); factors: (rows), f32.
template <class T> __device__ void scale_rows(const T *x, const float *factors, int64_t count, int c, T *y) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) y[at] = from_float<T>(to_float(x[at]) * factors[at / c]);
}

#define HEAD(T) \
    extern "C" __global__ void token_logprobs_##T(T *logits, const uint32_t *targets, int64_t v, int wanted, int vectors, float *logprobs) { \
        begin(); \
        token_logprobs<T>(logits, targets, v, wanted, vectors, logprobs); \
    } \
    extern "C" __global__ void scale_rows_##T(const T *x, const float *factors, int64_t count, int c, T *y) { \
        begin(); \
        scale_rows<T>(x, factors, count, c, y); \
    }
HEAD(float)
HEAD(bf16)
