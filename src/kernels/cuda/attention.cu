// Attention of rows of queries over lists of keys, on plain arithmetic: any head of up to 256 numbers, in multiples of 4.
//
// Keys and values are slots of (k, d). A list names its slots through a table: entry `at` of the list is in block table[list + at / size]
// at place at % size, so a paged cache has its block tables and a training step, with a size of 1, the rows themselves. A query whose list
// ends at `end` sees entries max(0, end − window) .. end; a window of 0 has no border.
#include "device.cuh"

__device__ inline int64_t slot_of(const uint32_t *table, int size, int at) {
    return size == 1 ? table[at] : static_cast<int64_t>(table[at / size]) * size + at % size;
}
__device__ inline int first_seen(int end, int window) { return window > 0 && end > window ? end - window : 0; }

// Query heads whose outputs are summed at once, and rows of keys or values that a thread has asked for at once.
constexpr int HEADS = 4, AHEAD = 4;

// One block a (query, key head, part of its list): scores of all heads of the group, their weights, their sums of values.
// q, out: (n, k·group, d); tasks: row, list, end of each query. Parts are `span` keys; with more than one, sums and their maxima go to
// `partial`, (tasks, k·group, parts, d), and `stats`, (…, parts, 2), for attend_combine. lse, (n, k·group), may be null.
template <class T, int VEC>
__device__ void attend_rows(
    const T *q, const T *k, const T *v, const uint32_t *tasks, const uint32_t *table, int size, int group, int d, int lanes,
    float scale, int window, int span, T *out, float *partial, float *stats, float *lse) {
    SHARED(bytes);
    const int heads = gridDim.y, kv = blockIdx.y, parts = gridDim.z, part = blockIdx.z;
    const int all = heads * group, subs = blockDim.x / lanes, sub = threadIdx.x / lanes, lane = threadIdx.x % lanes;
    const int column = lane * VEC;
    const int64_t row = tasks[3 * blockIdx.x];
    const uint32_t *list = table + tasks[3 * blockIdx.x + 1];
    const int end = tasks[3 * blockIdx.x + 2];
    const int first = first_seen(end, window) + part * span, last = min(first + span, end);
    if (part > 0 && first >= end) return;

    float *queries = reinterpret_cast<float *>(bytes); // (group, d)
    float *scores = queries + group * d;               // (group, span)
    float *sums = scores + group * span;               // (subs, HEADS, lanes · VEC)
    float *largest = sums + subs * HEADS * lanes * VEC, *total = largest + group;
    for (int at = threadIdx.x; at < group * d; at += blockDim.x) queries[at] = to_float(q[(row * all + kv * group) * d + at]);
    __syncthreads();

    for (int base = first; base < last; base += subs * AHEAD) {
        float keys[AHEAD][VEC] = {};
#pragma unroll
        for (int next = 0; next < AHEAD; next++) {
            const int at = base + next * subs + sub;
            if (at < last && column < d) read<VEC>(k + (slot_of(list, size, at) * heads + kv) * d + column, keys[next]);
        }
        for (int head = 0; head < group; head++)
#pragma unroll
            for (int next = 0; next < AHEAD; next++) {
                const int at = base + next * subs + sub;
                float score = 0;
                if (column < d)
#pragma unroll
                    for (int i = 0; i < VEC; i++) score += keys[next][i] * queries[head * d + column + i];
                score = sum_of(score, lanes);
                if (at < last && lane == 0) scores[head * span + at - first] = score * scale;
            }
    }
    __syncthreads();

    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, own = threadIdx.x % 32;
    for (int head = warp; head < group; head += warps) {
        float *row_scores = scores + head * span;
        float most = -INFINITY, sum = 0;
        for (int at = own; at < last - first; at += 32) most = fmaxf(most, row_scores[at]);
        most = max_of(most, 32);
        for (int at = own; at < last - first; at += 32) {
            row_scores[at] = __expf(row_scores[at] - most);
            sum += row_scores[at];
        }
        sum = sum_of(sum, 32);
        if (own == 0) largest[head] = most, total[head] = sum;
    }
    __syncthreads();

    for (int from = 0; from < group; from += HEADS) {
        float mine[HEADS][VEC] = {};
        for (int base = first + sub; base < last && column < d; base += subs * AHEAD) {
            float values[AHEAD][VEC] = {};
#pragma unroll
            for (int next = 0; next < AHEAD; next++) {
                const int at = base + next * subs;
                if (at < last) read<VEC>(v + (slot_of(list, size, at) * heads + kv) * d + column, values[next]);
            }
#pragma unroll
            for (int next = 0; next < AHEAD; next++)
#pragma unroll
                for (int head = 0; head < HEADS; head++) {
                    const int at = base + next * subs;
                    const float weight = from + head < group && at < last ? scores[(from + head) * span + at - first] : 0.0f;
#pragma unroll
                    for (int i = 0; i < VEC; i++) mine[head][i] += weight * values[next][i];
                }
        }
#pragma unroll
        for (int head = 0; head < HEADS; head++)
#pragma unroll
            for (int i = 0; i < VEC; i++) sums[((sub * HEADS + head) * lanes + lane) * VEC + i] = mine[head][i];
        __syncthreads();
        for (int at = threadIdx.x; at < HEADS * d; at += blockDim.x) {
            const int head = at / d, place = at % d;
            if (from + head >= group) continue;
            float sum = 0;
            for (int other = 0; other < subs; other++) sum += sums[(other * HEADS + head) * lanes * VEC + place];
            const int query = kv * group + from + head;
            if (parts == 1)
                out[(row * all + query) * d + place] = from_float<T>(sum / total[from + head]);
            else
                partial[((static_cast<int64_t>(blockIdx.x) * all + query) * parts + part) * d + place] = sum;
        }
        __syncthreads();
    }
    for (int head = threadIdx.x; head < group; head += blockDim.x) {
        const int query = kv * group + head;
        if (parts > 1) {
            float *to = stats + ((static_cast<int64_t>(blockIdx.x) * all + query) * parts + part) * 2;
            to[0] = largest[head], to[1] = total[head];
        } else if (lse) {
            lse[row * all + query] = largest[head] + __logf(total[head]);
        }
    }
}

// The parts of attend_rows together, one block a (query, head).
template <class T>
__device__ void attend_combine(
    const float *partial, const float *stats, const uint32_t *tasks, int parts, int d, int window, int span, T *out, float *lse) {
    const int all = gridDim.y;
    const int64_t row = tasks[3 * blockIdx.x], head = blockIdx.y, first = (static_cast<int64_t>(blockIdx.x) * all + head) * parts;
    const int end = tasks[3 * blockIdx.x + 2], seen = end - first_seen(end, window), mine = (seen + span - 1) / span;
    float most = -INFINITY, total = 0;
    for (int part = 0; part < mine; part++) most = fmaxf(most, stats[(first + part) * 2]);
    for (int part = 0; part < mine; part++) total += stats[(first + part) * 2 + 1] * __expf(stats[(first + part) * 2] - most);
    for (int at = threadIdx.x; at < d; at += blockDim.x) {
        float sum = 0;
        for (int part = 0; part < mine; part++) sum += partial[(first + part) * d + at] * __expf(stats[(first + part) * 2] - most);
        out[(row * all + head) * d + at] = from_float<T>(sum / total);
    }
    if (lse && threadIdx.x == 0) lse[row * all + head] = most + __logf(total);
}

// Σ out·dout of each (query, head), (n, h): the softmax's own pull. One warp each.
template <class T> __device__ void attend_pull(const T *out, const T *dout, int64_t rows, int d, float *pull) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    float sum = 0;
    if (row < rows)
        for (int at = threadIdx.x % 32; at < d; at += 32) sum += to_float(out[row * d + at]) * to_float(dout[row * d + at]);
    sum = sum_of(sum, 32);
    if (row < rows && threadIdx.x % 32 == 0) pull[row] = sum;
}

// A row of up to 256 numbers, spread over a warp.
struct Spread {
    float at[8];
    template <class T> __device__ void read_row(const T *from, int d) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int place = threadIdx.x % 32 + 32 * i;
            at[i] = place < d ? to_float(from[place]) : 0.0f;
        }
    }
    template <class T> __device__ void write_row(T *to, int d) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int place = threadIdx.x % 32 + 32 * i;
            if (place < d) to[place] = from_float<T>(at[i]);
        }
    }
    __device__ float dot(const Spread &other) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) sum += at[i] * other.at[i];
        return sum_of(sum, 32);
    }
    __device__ void add(float weight, const Spread &other) {
#pragma unroll
        for (int i = 0; i < 8; i++) at[i] += weight * other.at[i];
    }
};

// Gradient in the queries, one warp a (query, head). tasks as attend_rows has them, one for each row of the step.
template <class T>
__device__ void attend_dq(
    const T *q, const T *k, const T *v, const T *dout, const float *lse, const float *pull, const uint32_t *tasks,
    const uint32_t *table, int size, int64_t count, int all, int group, int d, float scale, int window, T *dq) {
    const int64_t index = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (index >= count) return;
    const int64_t task = index / all, head = index % all, row = tasks[3 * task], kv = head / group, place = row * all + head;
    const uint32_t *list = table + tasks[3 * task + 1];
    const int end = tasks[3 * task + 2];
    Spread query, pulled, key, value, sum = {};
    query.read_row(q + place * d, d);
    pulled.read_row(dout + place * d, d);
    const float largest = lse[place], own = pull[place];
    for (int at = first_seen(end, window); at < end; at++) {
        const int64_t slot = slot_of(list, size, at) * (all / group) + kv;
        key.read_row(k + slot * d, d);
        value.read_row(v + slot * d, d);
        const float weight = __expf(query.dot(key) * scale - largest);
        sum.add(weight * (pulled.dot(value) - own) * scale, key);
    }
    sum.write_row(dq + place * d, d);
}

// Gradients in the keys and values, one warp a (row, key head); blocks are tiles of consecutive rows. tiles: first row, rows, first view,
// views of each. views: first row and rows of a run that sees the tile, the tile's first entry in its list, entries before its own rows.
template <class T>
__device__ void attend_dkv(
    const T *q, const T *k, const T *v, const T *dout, const float *lse, const float *pull, const uint32_t *tiles,
    const uint32_t *views, int group, int d, float scale, int window, T *dk, T *dv) {
    const int heads = gridDim.y, kv = blockIdx.y, all = heads * group;
    const uint32_t *tile = tiles + 4 * blockIdx.x;
    for (int own = threadIdx.x / 32; own < static_cast<int>(tile[1]); own += blockDim.x / 32) {
        const int64_t place = (static_cast<int64_t>(tile[0]) + own) * heads + kv;
        Spread key, value, query, pulled, key_sum = {}, value_sum = {};
        key.read_row(k + place * d, d);
        value.read_row(v + place * d, d);
        for (uint32_t index = tile[2]; index < tile[2] + tile[3]; index++) {
            const uint32_t *view = views + 4 * index;
            const int entry = view[2] + own, before = view[3];
            // A run's row `at` sees entries up to before + at.
            const int first = max(0, entry - before);
            const int last = window > 0 ? min(static_cast<int>(view[1]), entry - before + window) : static_cast<int>(view[1]);
            for (int at = first; at < last; at++)
                for (int member = 0; member < group; member++) {
                    const int64_t from = (static_cast<int64_t>(view[0]) + at) * all + kv * group + member;
                    query.read_row(q + from * d, d);
                    pulled.read_row(dout + from * d, d);
                    const float weight = __expf(query.dot(key) * scale - lse[from]);
                    value_sum.add(weight, pulled);
                    key_sum.add(weight * (pulled.dot(value) - pull[from]) * scale, query);
                }
        }
        key_sum.write_row(dk + place * d, d);
        value_sum.write_row(dv + place * d, d);
    }
}

#define ROWS_OF(T, VEC) \
    extern "C" __global__ void __launch_bounds__(256) attend_rows_##VEC##_##T( \
        const T *q, const T *k, const T *v, const uint32_t *tasks, const uint32_t *table, int size, int group, int d, int lanes, \
        float scale, int window, int span, T *out, float *partial, float *stats, float *lse) { \
        begin(); \
        attend_rows<T, VEC>(q, k, v, tasks, table, size, group, d, lanes, scale, window, span, out, partial, stats, lse); \
    }
#define ATTENTION(T) \
    ROWS_OF(T, 4) \
    ROWS_OF(T, 8) \
    extern "C" __global__ void attend_combine_##T( \
        const float *partial, const float *stats, const uint32_t *tasks, int parts, int d, int window, int span, T *out, float *lse) { \
        begin(); \
        attend_combine<T>(partial, stats, tasks, parts, d, window, span, out, lse); \
    } \
    extern "C" __global__ void attend_pull_##T(const T *out, const T *dout, int64_t rows, int d, float *pull) { \
        begin(); \
        attend_pull<T>(out, dout, rows, d, pull); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attend_dq_##T( \
        const T *q, const T *k, const T *v, const T *dout, const float *lse, const float *pull, const uint32_t *tasks, \
        const uint32_t *table, int size, int64_t count, int all, int group, int d, float scale, int window, T *dq) { \
        begin(); \
        attend_dq<T>(q, k, v, dout, lse, pull, tasks, table, size, count, all, group, d, scale, window, dq); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attend_dkv_##T( \
        const T *q, const T *k, const T *v, const T *dout, const float *lse, const float *pull, const uint32_t *tiles, \
        const uint32_t *views, int group, int d, float scale, int window, T *dk, T *dv) { \
        begin(); \
        attend_dkv<T>(q, k, v, dout, lse, pull, tiles, views, group, d, scale, window, dk, dv); \
    }
ATTENTION(float)
ATTENTION(bf16)
