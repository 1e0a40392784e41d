// Attention on tensor cores: tiles of 64 queries (or keys) of bf16 against blocks of keys (or queries), 16 rows a warp, sums in f32 in
// registers. Lists and windows are those of attention.cu.
//
// A tile's products come out of multiply_add two neighbouring columns a register: rows g and g + 8 of the warp's 16 for lane 4g + t.
// Two such results side by side are, packed, the first operand of the next product.
#include "attention.cu"

constexpr int TILE = 64;

// `rows` rows of shared memory, D + 8 numbers apart so that lanes meet no bank twice; what `from` has no row for is zero.
template <int D, class From> __device__ inline void fill(bf16 *to, int rows, From from) {
    for (int at = threadIdx.x; at < rows * (D / 8); at += blockDim.x) {
        const int row = at / (D / 8), column = at % (D / 8) * 8;
        const bf16 *source = from(row);
        uint4 eight = {0, 0, 0, 0};
        if (source) eight = *reinterpret_cast<const uint4 *>(source + column);
        *reinterpret_cast<uint4 *>(to + row * (D + 8) + column) = eight;
    }
}

// Rows 16·warp .. of a tile as a first operand, columns `column` ..+16.
template <int D> __device__ inline void row_operand(uint32_t (&a)[4], const bf16 *tile, int column) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    const bf16 *from = tile + row * (D + 8) + column + lane % 4 * 2;
    a[0] = *reinterpret_cast<const uint32_t *>(from);
    a[1] = *reinterpret_cast<const uint32_t *>(from + 8 * (D + 8));
    a[2] = *reinterpret_cast<const uint32_t *>(from + 8);
    a[3] = *reinterpret_cast<const uint32_t *>(from + 8 * (D + 8) + 8);
}

// products (16, N) = the warp's rows of `left` · the N rows of `right`, turned.
template <int D, int N> __device__ inline void against(float (&products)[N / 8][4], const bf16 *left, const bf16 *right) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int at = 0; at < 4; at++) products[n][at] = 0;
#pragma unroll
    for (int column = 0; column < D; column += 16) {
        uint32_t a[4];
        row_operand<D>(a, left, column);
#pragma unroll
        for (int n = 0; n < N / 8; n++) {
            const bf16 *from = right + (n * 8 + lane / 4) * (D + 8) + column + lane % 4 * 2;
            const uint32_t b[2] = {*reinterpret_cast<const uint32_t *>(from), *reinterpret_cast<const uint32_t *>(from + 8)};
            multiply_add(products[n], a, b);
        }
    }
}

// sums (16, D) += weights (16, N) · the N rows of `right`.
template <int D, int N> __device__ inline void onto(float (&sums)[D / 8][4], const float (&weights)[N / 8][4], const bf16 *right) {
#pragma unroll
    for (int n = 0; n < N / 8; n += 2) {
        const uint32_t a[4] = {
            pack(weights[n][0], weights[n][1]), pack(weights[n][2], weights[n][3]),
            pack(weights[n + 1][0], weights[n + 1][1]), pack(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
        for (int column = 0; column < D; column += 8) {
            uint32_t b[2];
            turned_operand(b, right + n * 8 * (D + 8) + column, D + 8);
            multiply_add(sums[column / 8], a, b);
        }
    }
}

// The warp's rows of sums to rows of global memory; `to` gives null for a row that is none.
template <int D, class To> __device__ inline void write(const float (&sums)[D / 8][4], const float (&scales)[2], To to) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bf16 *out = to(row + 8 * half);
        if (!out) continue;
#pragma unroll
        for (int column = 0; column < D; column += 8)
            *reinterpret_cast<uint32_t *>(out + column + lane % 4 * 2) =
                pack(sums[column / 8][2 * half] * scales[half], sums[column / 8][2 * half + 1] * scales[half]);
    }
}

// One block a (tile of queries, head). tiles: first row, rows, list, end of the first row's keys; each row's end is one further.
template <int D, int N>
__device__ void attend_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const uint32_t *tiles, const uint32_t *table, int size, int group, float scale,
    int window, bf16 *out, float *lse) {
    SHARED(bytes);
    bf16 *queries = reinterpret_cast<bf16 *>(bytes), *keys = queries + TILE * (D + 8), *values = keys + N * (D + 8);
    const int all = gridDim.y, head = blockIdx.y, heads = all / group, kv = head / group;
    const uint32_t *tile = tiles + 4 * blockIdx.x, *list = table + tile[2];
    const int64_t first_row = tile[0];
    const int rows = tile[1], end = tile[3], past = end + rows - 1;
    fill<D>(queries, TILE, [&](int row) { return row < rows ? q + ((first_row + row) * all + head) * D : nullptr; });
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    float sums[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, total[2] = {0, 0};
    for (int base = first_seen(end, window); base < past; base += N) {
        __syncthreads();
        auto place = [&](int at) { return (slot_of(list, size, base + at) * heads + kv) * D; };
        fill<D>(keys, N, [&](int at) { return base + at < past ? k + place(at) : nullptr; });
        fill<D>(values, N, [&](int at) { return base + at < past ? v + place(at) : nullptr; });
        __syncthreads();
        float scores[N / 8][4];
        against<D, N>(scores, queries, keys);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int own = end + mine + 8 * half;
            float largest = most[half];
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int at = 2 * half; at < 2 * half + 2; at++) {
                    const int entry = base + n * 8 + lane % 4 * 2 + at % 2;
                    const bool seen = entry < own && entry < past && (window <= 0 || entry >= own - window);
                    scores[n][at] = seen ? scores[n][at] * scale : -INFINITY;
                    largest = fmaxf(largest, scores[n][at]);
                }
            largest = max_of(largest, 4);
            // Nothing seen yet: any number instead of minus infinity gives weights of zero.
            const float from = largest == -INFINITY ? 0.0f : largest, shrink = __expf(most[half] - from);
            float sum = 0;
#pragma unroll
            for (int n = 0; n < N / 8; n++)
#pragma unroll
                for (int at = 2 * half; at < 2 * half + 2; at++) {
                    scores[n][at] = __expf(scores[n][at] - from);
                    sum += scores[n][at];
                }
            most[half] = largest;
            total[half] = total[half] * shrink + sum;
#pragma unroll
            for (int column = 0; column < D / 8; column++)
                sums[column][2 * half] *= shrink, sums[column][2 * half + 1] *= shrink;
        }
        onto<D, N>(sums, scores, values);
    }
    float scales[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        total[half] = sum_of(total[half], 4);
        const int row = mine + 8 * half;
        scales[half] = 1.0f / total[half];
        if (lse && lane % 4 == 0 && row < rows) lse[(first_row + row) * all + head] = most[half] + __logf(total[half]);
    }
    write<D>(sums, scales, [&](int row) { return row < rows ? out + ((first_row + row) * all + head) * D : nullptr; });
}

// Gradient in the queries, one block a (tile of queries, head), tiles as above.
template <int D, int N>
__device__ void attend_dq_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles,
    const uint32_t *table, int size, int group, float scale, int window, bf16 *dq) {
    SHARED(bytes);
    bf16 *queries = reinterpret_cast<bf16 *>(bytes), *pulled = queries + TILE * (D + 8);
    bf16 *keys = pulled + TILE * (D + 8), *values = keys + N * (D + 8);
    const int all = gridDim.y, head = blockIdx.y, heads = all / group, kv = head / group;
    const uint32_t *tile = tiles + 4 * blockIdx.x, *list = table + tile[2];
    const int64_t first_row = tile[0];
    const int rows = tile[1], end = tile[3], past = end + rows - 1;
    auto row_of = [&](const bf16 *from, int row) { return row < rows ? from + ((first_row + row) * all + head) * D : nullptr; };
    fill<D>(queries, TILE, [&](int row) { return row_of(q, row); });
    fill<D>(pulled, TILE, [&](int row) { return row_of(dout, row); });
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    float largest[2], own_pull[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = mine + 8 * half;
        const int64_t place = (first_row + row) * all + head;
        largest[half] = row < rows ? lse[place] : 0.0f;
        own_pull[half] = row < rows ? pull[place] : 0.0f;
    }
    float sums[D / 8][4] = {};
    for (int base = first_seen(end, window); base < past; base += N) {
        __syncthreads();
        auto place = [&](int at) { return (slot_of(list, size, base + at) * heads + kv) * D; };
        fill<D>(keys, N, [&](int at) { return base + at < past ? k + place(at) : nullptr; });
        fill<D>(values, N, [&](int at) { return base + at < past ? v + place(at) : nullptr; });
        __syncthreads();
        float weights[N / 8][4], slopes[N / 8][4];
        against<D, N>(weights, queries, keys);
        against<D, N>(slopes, pulled, values);
#pragma unroll
        for (int n = 0; n < N / 8; n++)
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int half = at / 2, row = mine + 8 * half, own = end + row, entry = base + n * 8 + lane % 4 * 2 + at % 2;
                const bool seen = row < rows && entry < own && (window <= 0 || entry >= own - window);
                const float weight = seen ? __expf(weights[n][at] * scale - largest[half]) : 0.0f;
                slopes[n][at] = weight * (slopes[n][at] - own_pull[half]) * scale;
            }
        onto<D, N>(sums, slopes, keys);
    }
    const float scales[2] = {1.0f, 1.0f};
    write<D>(sums, scales, [&](int row) { return row < rows ? dq + ((first_row + row) * all + head) * D : nullptr; });
}

// Gradients in the keys and values, one block a (tile of at most 64 rows, key head); tiles and views as attend_dkv has them.
template <int D, int N>
__device__ void attend_dkv_tiles(
    const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles,
    const uint32_t *views, int group, float scale, int window, bf16 *dk, bf16 *dv) {
    SHARED(bytes);
    bf16 *keys = reinterpret_cast<bf16 *>(bytes), *values = keys + TILE * (D + 8);
    bf16 *queries = values + TILE * (D + 8), *pulled = queries + N * (D + 8);
    float *largest = reinterpret_cast<float *>(pulled + N * (D + 8)), *own_pull = largest + N;
    const int heads = gridDim.y, kv = blockIdx.y, all = heads * group;
    const uint32_t *tile = tiles + 4 * blockIdx.x;
    const int64_t first_row = tile[0];
    const int rows = tile[1];
    fill<D>(keys, TILE, [&](int row) { return row < rows ? k + ((first_row + row) * heads + kv) * D : nullptr; });
    fill<D>(values, TILE, [&](int row) { return row < rows ? v + ((first_row + row) * heads + kv) * D : nullptr; });
    const int lane = threadIdx.x % 32, mine = threadIdx.x / 32 * 16 + lane / 4;
    float key_sums[D / 8][4] = {}, value_sums[D / 8][4] = {};
    for (uint32_t index = tile[2]; index < tile[2] + tile[3]; index++) {
        const uint32_t *view = views + 4 * index;
        // The run's row `at` sees entries up to ahead + at of the tile.
        const int run = view[1], ahead = static_cast<int>(view[3]) - static_cast<int>(view[2]);
        const int last = window > 0 ? min(run, rows - 1 - ahead + window) : run;
        for (int member = 0; member < group; member++)
            for (int base = max(0, -ahead); base < last; base += N) {
                __syncthreads();
                auto place = [&](int at) { return (static_cast<int64_t>(view[0]) + base + at) * all + kv * group + member; };
                fill<D>(queries, N, [&](int at) { return base + at < run ? q + place(at) * D : nullptr; });
                fill<D>(pulled, N, [&](int at) { return base + at < run ? dout + place(at) * D : nullptr; });
                for (int at = threadIdx.x; at < N; at += blockDim.x) {
                    largest[at] = base + at < run ? lse[place(at)] : 0.0f;
                    own_pull[at] = base + at < run ? pull[place(at)] : 0.0f;
                }
                __syncthreads();
                float weights[N / 8][4], slopes[N / 8][4];
                against<D, N>(weights, keys, queries);
                against<D, N>(slopes, values, pulled);
#pragma unroll
                for (int n = 0; n < N / 8; n++)
#pragma unroll
                    for (int at = 0; at < 4; at++) {
                        const int entry = mine + 8 * (at / 2), column = n * 8 + lane % 4 * 2 + at % 2, query = base + column;
                        const bool seen = query < run && entry < rows && entry <= ahead + query && (window <= 0 || entry > ahead + query - window);
                        weights[n][at] = seen ? __expf(weights[n][at] * scale - largest[column]) : 0.0f;
                        slopes[n][at] = weights[n][at] * (slopes[n][at] - own_pull[column]) * scale;
                    }
                onto<D, N>(value_sums, weights, pulled);
                onto<D, N>(key_sums, slopes, queries);
            }
    }
    const float scales[2] = {1.0f, 1.0f};
    auto to = [&](bf16 *out, int row) { return row < rows ? out + ((first_row + row) * heads + kv) * D : nullptr; };
    write<D>(key_sums, scales, [&](int row) { return to(dk, row); });
    write<D>(value_sums, scales, [&](int row) { return to(dv, row); });
}

#define FORWARD(D, N) \
    extern "C" __global__ void __launch_bounds__(128) attend_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const uint32_t *tiles, const uint32_t *table, int size, int group, float scale, \
        int window, bf16 *out, float *lse) { \
        attend_tiles<D, N>(q, k, v, tiles, table, size, group, scale, window, out, lse); \
    }
#define BACKWARD(D, N) \
    extern "C" __global__ void __launch_bounds__(128) attend_dq_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles, \
        const uint32_t *table, int size, int group, float scale, int window, bf16 *dq) { \
        attend_dq_tiles<D, N>(q, k, v, dout, lse, pull, tiles, table, size, group, scale, window, dq); \
    } \
    extern "C" __global__ void __launch_bounds__(128) attend_dkv_tiles_##D( \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *dout, const float *lse, const float *pull, const uint32_t *tiles, \
        const uint32_t *views, int group, float scale, int window, bf16 *dk, bf16 *dv) { \
        attend_dkv_tiles<D, N>(q, k, v, dout, lse, pull, tiles, views, group, scale, window, dk, dv); \
    }
// Keys at once as the sizes of registers and shared memory have it: tile_shape in attention.rs says the same.
FORWARD(64, 64)
FORWARD(128, 64)
FORWARD(256, 32)
BACKWARD(64, 32)
BACKWARD(128, 32)
