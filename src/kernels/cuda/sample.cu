// One token from each row of logits, as engine/sampler.rs draws it, and log-probabilities of the raw row.
//
// A block has a row. A token's weight is exp(-distance) as a whole number of 2^-40, where its distance is that of its logit from the
// largest over the temperature: sums are exact whatever their order, and equal distances are equal weights. What is kept is told by a
// distance and, of those that lie at it, by the last id. Distances are compared as the bits of a float, which order as they do.
#include "device.cuh"

constexpr int BINS = 2048;
constexpr uint32_t FARTHEST = 0x7f7fffff; // the largest finite distance

// What a row asks for, as sample.rs lays it out. Places count words from the first row's.
struct Wanted {
    uint32_t flags;
    float temperature, top_p, repetition;
    uint32_t farthest, top_k, uniform[2];
    uint32_t edits, edit_count, mask;
    uint32_t top, asked, asked_count, result;
};
enum : uint32_t { DRAW = 1, GREEDY = 2, LOGPROBS = 4, EDITED = 8, TAKEN = 1, BROKEN = 2, SCALED = 1u << 31, BANNED = 1u << 30 };

// Every thread gets what all threads of the block together make; `scratch` holds a number a warp.
template <class Merge> __device__ inline Whole block_merge(Whole value, Whole *scratch, Merge merge) {
    for (int step = 16; step > 0; step /= 2) value = merge(value, shuffle_xor(value, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    Whole all = scratch[0];
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / 32; warp++) all = merge(all, scratch[warp]);
    return all;
}
__device__ inline Whole block_most(Whole value, Whole *scratch) {
    return block_merge(value, scratch, [](Whole a, Whole b) { return a < b ? b : a; });
}
__device__ inline Whole block_total(Whole value, Whole *scratch) {
    return block_merge(value, scratch, [](Whole a, Whole b) { return a + b; });
}

// The first index below n where the running sum of measure(index) is more than aim(sum of all), or n; `left` becomes what the aim is
// beyond the sum before it.
template <class Measure, class Aim>
__device__ inline int locate(int n, Measure measure, Aim aim, Whole *scratch, Whole &left) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
    int first = 0, end = n;
    for (bool known = false; !known || end - first > 32; known = true) {
        const int piece = ((end - first + warps - 1) / warps + 31) / 32 * 32;
        const int from = first + warp * piece, to = min(end, from + piece);
        Whole sum = 0;
        for (int index = from + threadIdx.x % 32; index < to; index += 32) sum += measure(index);
        for (int step = 16; step > 0; step /= 2) sum += shuffle_xor(sum, step);
        __syncthreads();
        if (threadIdx.x % 32 == 0) scratch[warp] = sum;
        __syncthreads();
        if (!known) {
            Whole total = 0;
            for (int at = 0; at < warps; at++) total += scratch[at];
            left = aim(total);
            if (left >= total) return n;
        }
        int at = 0;
        for (; left >= scratch[at]; at++) left -= scratch[at];
        first += at * piece;
        end = min(end, first + piece);
    }
    for (;; first++) {
        const Whole here = measure(first);
        if (left < here) return first;
        left -= here;
    }
}

// A float's bits in the order of IEEE's total order.
__device__ inline uint32_t ordered(float value) {
    const uint32_t bits = __float_as_uint(value);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
// A number that is larger for a larger logit and, of equal ones, for a smaller id.
__device__ inline Whole ranked(float logit, int id) { return static_cast<Whole>(ordered(logit)) << 32 | ~static_cast<uint32_t>(id); }
__device__ inline int id_of(Whole rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }

// A row as a distribution: what is kept, and the weights of that.
struct Kept {
    const float *logits;
    float most, temperature;
    uint32_t farthest;
    int last;

    __device__ uint32_t distance(int id) const { return __float_as_uint(__fdiv_rn(__fsub_rn(most, logits[id]), temperature)); }
    __device__ static Whole weight(uint32_t distance) {
        return static_cast<Whole>(expf(-__uint_as_float(distance)) * 1099511627776.0f);
    }
    __device__ bool has(int id, uint32_t distance) const { return distance < farthest || (distance == farthest && id <= last); }
    __device__ Whole weight_of(int id) const {
        const uint32_t at = distance(id);
        return has(id, at) ? weight(at) : 0;
    }
};

// Cuts off what lies behind the token, nearest first and equals by id, where the running sum of of(distance) is more than aim(sum of
// all). Nothing is cut where it never is. Bins of equal width first, as floats' own bits crowd in few, then those bits in that bin.
template <class Of, class Aim> __device__ inline void cut(Kept &kept, int v, Of of, Aim aim, Whole *scratch, Whole *bins) {
    auto bin_of = [](uint32_t distance) { return static_cast<int>(fminf(64.0f * __uint_as_float(distance), BINS - 1.0f)); };
    auto in_bin = [&](int bin) { return bins[bin]; };
    auto gather = [&](auto bin) {
        __syncthreads();
        for (int at = threadIdx.x; at < BINS; at += blockDim.x) bins[at] = 0;
        __syncthreads();
        for (int id = threadIdx.x; id < v; id += blockDim.x) {
            const uint32_t distance = kept.distance(id);
            const int to = kept.has(id, distance) ? bin(distance) : -1;
            const Whole some = to < 0 ? 0 : of(distance);
            if (some) atomicAdd(bins + to, some);
        }
        __syncthreads();
    };
    Whole left;
    gather(bin_of);
    const int wide = locate(BINS, in_bin, aim, scratch, left);
    if (wide == BINS) return;
    uint32_t found = 0;
    Whole tied = 0;
    for (int width = 11, shift = 21; width > 0; width = shift < 11 ? shift : 11, shift -= width) {
        gather([&](uint32_t distance) {
            const bool within = bin_of(distance) == wide && (shift + width == 32 || distance >> (shift + width) == found);
            return within ? static_cast<int>(distance >> shift & ((1u << width) - 1)) : -1;
        });
        const Whole aimed = left;
        const int digit = locate(BINS, in_bin, [=](Whole) { return aimed; }, scratch, left);
        found = found << width | digit;
        tied = bins[digit];
    }
    int last = v - 1;
    const Whole aimed = left, each = of(found);
    if (aimed + each < tied) {
        auto at_it = [&](int id) { return kept.distance(id) == found && kept.has(id, found) ? each : 0; };
        last = locate(v, at_it, [=](Whole) { return aimed; }, scratch, left);
    } else if (found == kept.farthest) {
        last = kept.last;
    }
    kept.farthest = found, kept.last = last;
}

// logits: (rows, v), f32, changed in place; words: a Wanted a row and what they point to, changed in place. A row's result: the id; TAKEN
// where it may come and BROKEN where a logit is not finite; its log-probability; `top` ids and log-probabilities; ranks and log-probabilities of
// those asked for.
extern "C" __global__ void __launch_bounds__(1024) sample_rows(float *all, int v, uint32_t *words, uint32_t *results) {
    begin();
    SHARED(bytes);
    Whole *scratch = reinterpret_cast<Whole *>(bytes), *bins = scratch + 32; // (32), (BINS)
    const Wanted wanted = reinterpret_cast<const Wanted *>(words)[blockIdx.x];
    float *logits = all + static_cast<int64_t>(blockIdx.x) * v;
    uint32_t *result = results + wanted.result;
    // The largest, of equals the first, where zeros are equal; all ones where one is not finite and all should be.
    auto largest = [&](bool checked) {
        float most = -INFINITY;
        int id = 0;
        bool broken = false;
        for (int at = threadIdx.x; at < v; at += blockDim.x) {
            const float logit = logits[at];
            broken |= checked && !(fabsf(logit) < INFINITY);
            if (logit > most) most = logit, id = at;
        }
        const Whole best = block_most(most > -INFINITY ? ranked(most + 0.0f, id) : ranked(-INFINITY, 0), scratch);
        return block_most(broken, scratch) ? ~Whole(0) : best;
    };
    Whole best = largest(true);
    if (best == ~Whole(0)) {
        if (threadIdx.x == 0) result[0] = 0, result[1] = BROKEN;
        return;
    }
    const float raw_most = logits[id_of(best)];
    double log_sum = 0;
    auto logprob = [&](float logit) { return __float_as_uint(static_cast<float>(static_cast<double>(__fsub_rn(logit, raw_most)) - log_sum)); };
    if (wanted.flags & LOGPROBS) {
        Whole sum = 0;
        for (int at = threadIdx.x; at < v; at += blockDim.x) sum += Kept::weight(__float_as_uint(raw_most - logits[at]));
        log_sum = log(static_cast<double>(block_total(sum, scratch)) / 1099511627776.0);
        Whole before = ~Whole(0), mine = before;
        for (int place = 0; place < static_cast<int>(wanted.top); place++) {
            // Only who had the one before looks again.
            if (mine >= before) {
                mine = 0;
                for (int at = threadIdx.x; at < v; at += blockDim.x) {
                    const Whole rank = ranked(logits[at], at);
                    if (rank < before && rank > mine) mine = rank;
                }
            }
            before = block_most(mine, scratch);
            if (threadIdx.x == 0) {
                result[3 + 2 * place] = id_of(before);
                result[4 + 2 * place] = logprob(logits[id_of(before)]);
            }
        }
        for (int place = 0; place < static_cast<int>(wanted.asked_count); place++) {
            const float logit = logits[words[wanted.asked + place]];
            Whole larger = 0;
            for (int at = threadIdx.x; at < v; at += blockDim.x) larger += logits[at] > logit;
            larger = block_total(larger, scratch);
            if (threadIdx.x == 0) {
                uint32_t *to = result + 3 + 2 * (wanted.top + place);
                to[0] = 1 + larger, to[1] = logprob(logit);
            }
        }
    }
    if (!(wanted.flags & DRAW)) {
        if (threadIdx.x == 0) result[0] = 0, result[1] = 0, result[2] = 0;
        return;
    }
    __syncthreads();
    uint32_t *edits = words + wanted.edits; // id and flags, what is subtracted, what is added
    for (int at = threadIdx.x; at < static_cast<int>(wanted.edit_count); at += blockDim.x) {
        uint32_t *edit = edits + 3 * at;
        float *to = logits + (edit[0] & (BANNED - 1)), logit = *to;
        const float minus = __uint_as_float(edit[1]), plus = __uint_as_float(edit[2]);
        edit[1] = __float_as_uint(logit);
        if (edit[0] & SCALED) logit = logit > 0 ? __fdiv_rn(logit, wanted.repetition) : __fmul_rn(logit, wanted.repetition);
        *to = edit[0] & BANNED ? -INFINITY : __fadd_rn(__fsub_rn(logit, minus), plus);
    }
    __syncthreads();
    if (wanted.mask) {
        const uint32_t *mask = words + wanted.mask;
        for (int at = threadIdx.x; at < v; at += blockDim.x)
            if (!(mask[at / 32] >> at % 32 & 1)) logits[at] = -INFINITY;
        __syncthreads();
    }
    if (wanted.flags & EDITED) best = largest(false);
    int id = id_of(best);
    const float most = logits[id];
    if (!(wanted.flags & GREEDY) && most > -INFINITY) {
        Kept kept{logits, most + 0.0f, wanted.temperature, wanted.farthest, v - 1};
        if (wanted.top_k) {
            const Whole aim = wanted.top_k - 1;
            cut(kept, v, [](uint32_t at) { return Whole(Kept::weight(at) > 0); }, [=](Whole) { return aim; }, scratch, bins);
        }
        if (wanted.top_p < 1) {
            const double share = wanted.top_p;
            auto enough = [=](Whole total) { return max(static_cast<Whole>(ceil(share * static_cast<double>(total))), Whole(1)) - 1; };
            cut(kept, v, [](uint32_t at) { return Kept::weight(at); }, enough, scratch, bins);
        }
        const Whole uniform = static_cast<Whole>(wanted.uniform[1]) << 32 | wanted.uniform[0]; // of 2^53
        auto aim = [=](Whole total) { return __umul64hi(uniform, total) << 11 | uniform * total >> 53; };
        Whole left;
        id = locate(v, [&](int at) { return kept.weight_of(at); }, aim, scratch, left);
    }
    // Who holds the raw logit writes it.
    if (threadIdx.x == 0) {
        result[0] = id, result[1] = logits[id] > -INFINITY ? TAKEN : 0;
        result[2] = logprob(logits[id]);
    }
    __syncthreads();
    for (int at = threadIdx.x; at < static_cast<int>(wanted.edit_count); at += blockDim.x)
        if (static_cast<int>(edits[3 * at] & (BANNED - 1)) == id) result[2] = logprob(__uint_as_float(edits[3 * at + 1]));
}
