// The head's pieces: rows of logits to log-probabilities of targets and their gradient in place.
#include "device.cuh"

// log softmax(row)[target], f32, one block a row; with `wanted` the logits become onehot(target) − softmax. logits: (rows, v).
template <class T>
__device__ void token_logprobs(T *logits, const uint32_t *targets, int64_t v, int wanted, float *logprobs) {
    SHARED(bytes);
    float *scratch = reinterpret_cast<float *>(bytes);
    T *row = logits + static_cast<int64_t>(blockIdx.x) * v;
    const int64_t target = targets[blockIdx.x];
    float most = -INFINITY, sum = 0;
    for (int64_t at = threadIdx.x; at < v; at += blockDim.x) {
        const float logit = to_float(row[at]);
        if (logit > most) {
            sum *= __expf(most - logit);
            most = logit;
        }
        if (logit > -INFINITY) sum += __expf(logit - most);
    }
    const float largest = block_max(most, scratch);
    const float total = block_sum(most > -INFINITY ? sum * __expf(most - largest) : 0.0f, scratch);
    const float aim = to_float(row[target]);
    // Everyone has read the target before it is overwritten.
    __syncthreads();
    if (threadIdx.x == 0) logprobs[blockIdx.x] = aim - largest - logf(total);
    if (!wanted) return;
    const float scale = 1.0f / total;
    for (int64_t at = threadIdx.x; at < v; at += blockDim.x) {
        const float weight = expf(to_float(row[at]) - largest) * scale;
        row[at] = from_float<T>((at == target ? 1.0f : 0.0f) - weight);
    }
}

// Rows times a number each. x, y: (rows, c); factors: (rows), f32.
template <class T> __device__ void scale_rows(const T *x, const float *factors, int64_t count, int c, T *y) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at < count) y[at] = from_float<T>(to_float(x[at]) * factors[at / c]);
}

#define HEAD(T) \
    extern "C" __global__ void token_logprobs_##T(T *logits, const uint32_t *targets, int64_t v, int wanted, float *logprobs) { \
        token_logprobs<T>(logits, targets, v, wanted, logprobs); \
    } \
    extern "C" __global__ void scale_rows_##T(const T *x, const float *factors, int64_t count, int c, T *y) { \
        scale_rows<T>(x, factors, count, c, y); \
    }
HEAD(float)
HEAD(bf16)
