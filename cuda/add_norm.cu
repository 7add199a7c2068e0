// SPDX-License-Identifier: MIT
// The residual sum and the norm that reads it, in one pass: s = x + branch, out = norm(s) weight + bias
// with norm(s) = s / rms(s), or (s - mean(s)) / deviation(s) if LAYER; and all gradients of both.
//
// Memory contract. x, sum and dx (rows, H) are DTYPE; branch and dbranch BRANCH; out and its gradient
// OUT; weight, bias (groups, H) WEIGHT; stats (rows, 1 + LAYER) State: 1 / deviation, and the mean after
// it if LAYER. All are contiguous, rows = groups * each, and each is read or written once. Without a
// branch (a null pointer) nothing is written to `sum`. AFFINE is 0: neither weight nor bias, 1: weight,
// 2: both. Forward at 32768 rows of 1024, DTYPE float32, BRANCH and OUT bfloat16: 402 MB; backward:
// 536 MB. dbranch is written only if its pointer is not null, and grad_sum read likewise. Sums over rows
// are `partial` (blocks of a group, AFFINE, groups, H), State, added up by sum.cu.
//
// Launch. A team of WARPS warps keeps a row in registers: ITEMS groups of WIDTH neighbours a thread,
// 32 * WARPS * ITEMS * WIDTH >= H. ALIGNED: H is a multiple of WIDTH and every address of 16 bytes. A
// block has TEAMS teams. Forward: grid ceil(rows / TEAMS). Backward: `blocks` blocks a group, whose
// teams take the group's rows in turn. The order of a row's sums is: the neighbours of a group, the groups
// of a lane in the order of the row, if ITEMS or WARPS is 1, else first those of a thread, then over the
// lanes. Forward: one warp a row or a warp for every group of lanes give the same bits. The rest depends
// on dtype and H alone. Forward overlaps the kernel before.
#include "memory.cuh"
#include "numbers.cuh"

using Stream = DTYPE;
using Branch = BRANCH;
using Out = OUT;
using Weight = WEIGHT;
using State = typename StateOf<Stream>::type;
using Group = State[WIDTH];

constexpr int SPAN = 32 * WARPS;  // threads of a team
constexpr int THREADS = SPAN * TEAMS;

__device__ __forceinline__ float inverse_root(float x) { return __frsqrt_rn(x); }
__device__ __forceinline__ double inverse_root(double x) { return rsqrt(x); }

template <class T>
constexpr int PACK = sizeof(T) * WIDTH <= 16 ? WIDTH : 16 / int(sizeof(T));

// Read the neighbours p[0 ... WIDTH), of which `count` are there; the others are zero.
template <class T>
__device__ __forceinline__ void read(const T* p, int count, Group& v) {
    if constexpr (ALIGNED) {
#pragma unroll
        for (int i = 0; i < WIDTH; i += PACK<T>) {
            const auto pack = Pack<T, PACK<T>>::load(p + i);
#pragma unroll
            for (int j = 0; j < PACK<T>; ++j) v[i + j] = State(widen(pack.item[j]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) v[i] = i < count ? State(widen(p[i])) : State(0);
    }
}

template <class T>
__device__ __forceinline__ void write(T* p, int count, const Group& v) {
    if constexpr (ALIGNED) {
#pragma unroll
        for (int i = 0; i < WIDTH; i += PACK<T>) {
            Pack<T, PACK<T>> pack;
#pragma unroll
            for (int j = 0; j < PACK<T>; ++j) pack.item[j] = narrow<T>(v[i + j]);
            pack.store(p + i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            if (i < count) p[i] = narrow<T>(v[i]);
    }
}

// Add up each x over the team; all its threads get the sums, over warps first. All threads of the block
// come here, and `side` says which half of the slots is free, so that one barrier a call is enough.
template <int N>
using Slots = State[2][TEAMS][WARPS][N][WARPS > 1 ? 32 : 1];

template <int N>
__device__ __forceinline__ void total(State (&x)[N], Slots<N>& slots, int& side) {
    if constexpr (WARPS > 1) {
        const int team = threadIdx.x / SPAN, warp = threadIdx.x % SPAN / 32, lane = threadIdx.x % 32;
        auto& mine = slots[side][team];
        side ^= 1;
#pragma unroll
        for (int i = 0; i < N; ++i) mine[warp][i][lane] = x[i];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N; ++i) {
            x[i] = mine[0][i][lane];
#pragma unroll
            for (int w = 1; w < WARPS; ++w) x[i] = add(x[i], mine[w][i][lane]);
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2)
#pragma unroll
        for (int i = 0; i < N; ++i) x[i] = add(x[i], __shfl_xor_sync(~0u, x[i], mask));
}

#ifdef FORWARD

struct Arguments {
    const Stream* x;
    const Branch* branch;
    const Weight *weight, *bias;
    Stream* sum;
    Out* out;
    State* stats;
    long long channels, each, rows;
    double inverse, eps;  // 1 / H, and what is added to the mean square
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(const __grid_constant__ Arguments p) {
    __shared__ Slots<1> slots;
    int side = 0;
    const int lane = threadIdx.x % SPAN;
    const long long row = (long long)blockIdx.x * TEAMS + threadIdx.x / SPAN;
    const bool there = row < p.rows;
    const int channels = int(p.channels), wide = there ? channels : 0;
    const long long at = (there ? row : 0) * p.channels;
    const long long own = (there ? row / p.each : 0) * p.channels;
    overlap_previous();
    Group s[ITEMS], w[ITEMS], b[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int c = (i * SPAN + lane) * WIDTH;
        if (c < wide) read(p.x + at + c, wide - c, s[i]);
        else
#pragma unroll
            for (int v = 0; v < WIDTH; ++v) s[i][v] = State(0);
    }
    const auto weights = [&](int i) {
        const int c = (i * SPAN + lane) * WIDTH;
        if (c >= wide) return;
        if (AFFINE > 0) read(p.weight + own + c, wide - c, w[i]);
        if (AFFINE > 1) read(p.bias + own + c, wide - c, b[i]);
    };
    if (ITEMS == 1) weights(0);  // few rows: they have far to come
    if (p.branch != nullptr) {
        Group added[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int c = (i * SPAN + lane) * WIDTH;
            if (c < wide) read(p.branch + at + c, wide - c, added[i]);
        }
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int c = (i * SPAN + lane) * WIDTH;
            if (c >= wide) continue;
#pragma unroll
            for (int v = 0; v < WIDTH; ++v)  // the norm is that of the sum as it is kept
                s[i][v] = State(widen(narrow<Stream>(add(
                    s[i][v], State(widen(narrow<Stream>(added[i][v])))))));
            write(p.sum + at + c, wide - c, s[i]);
        }
    }
    State mean = State(0);
#if LAYER
    State first[1] = {State(0)};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        State part = State(0);
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) part = add(part, s[i][v]);
        first[0] = i == 0 ? part : add(first[0], part);
    }
    total(first, slots, side);
    mean = mul(first[0], State(p.inverse));
#endif
    State squares[1] = {State(0)};
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int c = (i * SPAN + lane) * WIDTH;
        State part = State(0);
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) {
            const State d = c + v < wide ? add(s[i][v], -mean) : State(0);
            part = fma(d, d, part);
        }
        squares[0] = i == 0 ? part : add(squares[0], part);
    }
    total(squares, slots, side);
    const State scale = inverse_root(fma(squares[0], State(p.inverse), State(p.eps)));
    if (there && lane == 0) {
        p.stats[row * (1 + LAYER)] = scale;
        if (LAYER) p.stats[row * (1 + LAYER) + LAYER] = mean;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int c = (i * SPAN + lane) * WIDTH;
        if (ITEMS > 1) weights(i);
        if (c >= wide) continue;
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) {
            State y = mul(add(s[i][v], -mean), scale);
            if (AFFINE == 1) y = mul(y, w[i][v]);
            if (AFFINE == 2) y = fma(y, w[i][v], b[i][v]);
            s[i][v] = y;
        }
        write(p.out + at + c, wide - c, s[i]);
    }
}

#else

struct Arguments {
    const Stream* grad_sum;
    const Out* grad_out;
    const Stream* sum;
    const State* stats;
    const Weight* weight;
    Stream* dx;
    Branch* dbranch;
    State* partial;
    long long channels, each, groups, blocks;
    double inverse;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Add up what the teams of the block hold for the same channels; the first one has the sum.
__device__ __forceinline__ void gather(Group (&sums)[ITEMS]) {
    if constexpr (TEAMS > 1) {
        __shared__ State given[ITEMS][WIDTH][SPAN];
        const int team = threadIdx.x / SPAN, lane = threadIdx.x % SPAN;
        for (int giver = 1; giver < TEAMS; ++giver) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int v = 0; v < WIDTH; ++v)
                    if (team == giver) given[i][v][lane] = sums[i][v];
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ITEMS; ++i)
#pragma unroll
                for (int v = 0; v < WIDTH; ++v)
                    if (team == 0) sums[i][v] = add(sums[i][v], given[i][v][lane]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    add_norm_backward(const __grid_constant__ Arguments p) {
    __shared__ Slots<1 + LAYER> slots;
    int side = 0;
    const int team = threadIdx.x / SPAN, lane = threadIdx.x % SPAN;
    const long long group = blockIdx.x / p.blocks, block = blockIdx.x - group * p.blocks;
    const int channels = int(p.channels);
    Group w[ITEMS], dw[ITEMS], db[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int c = (i * SPAN + lane) * WIDTH;
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) dw[i][v] = db[i][v] = w[i][v] = State(0);
        if (AFFINE > 0 && c < channels)
            read(p.weight + group * p.channels + c, channels - c, w[i]);
    }
    for (long long first = block * TEAMS; first < p.each; first += p.blocks * TEAMS) {
        const bool there = first + team < p.each;
        const long long row = group * p.each + (there ? first + team : 0);
        const long long at = row * p.channels;
        const int wide = there ? channels : 0;
        Group s[ITEMS], g[ITEMS], more[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int c = (i * SPAN + lane) * WIDTH;
#pragma unroll
            for (int v = 0; v < WIDTH; ++v) s[i][v] = g[i][v] = more[i][v] = State(0);
            if (c < wide) {
                read(p.grad_out + at + c, wide - c, g[i]);
                read(p.sum + at + c, wide - c, s[i]);
                if (p.grad_sum != nullptr) read(p.grad_sum + at + c, wide - c, more[i]);
            }
        }
        const State scale = p.stats[row * (1 + LAYER)];
        const State mean = LAYER ? p.stats[row * (1 + LAYER) + LAYER] : State(0);
        State sums[1 + LAYER];
#pragma unroll
        for (int i = 0; i < 1 + LAYER; ++i) sums[i] = State(0);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int c = (i * SPAN + lane) * WIDTH;
#pragma unroll
            for (int v = 0; v < WIDTH; ++v) {
                s[i][v] = c + v < wide ? mul(add(s[i][v], -mean), scale) : State(0);
                if (AFFINE > 1) db[i][v] = add(db[i][v], g[i][v]);
                if (AFFINE > 0) {
                    dw[i][v] = fma(g[i][v], s[i][v], dw[i][v]);
                    g[i][v] = mul(g[i][v], w[i][v]);
                }
                sums[0] = fma(g[i][v], s[i][v], sums[0]);
                if (LAYER) sums[LAYER] = add(sums[LAYER], g[i][v]);
            }
        }
        total(sums, slots, side);
        const State along = mul(sums[0], State(p.inverse));
        const State level = LAYER ? mul(sums[LAYER], State(p.inverse)) : State(0);
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) {
            const int c = (i * SPAN + lane) * WIDTH;
            if (c >= wide) continue;
#pragma unroll
            for (int v = 0; v < WIDTH; ++v) {
                const State d = fma(-s[i][v], along, add(g[i][v], -level));
                s[i][v] = fma(d, scale, more[i][v]);
            }
            write(p.dx + at + c, wide - c, s[i]);
            if (p.dbranch != nullptr) write(p.dbranch + at + c, wide - c, s[i]);
        }
    }
    if (AFFINE > 0) gather(dw);
    if (AFFINE > 1) gather(db);
    if (team > 0) return;
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
        const int c = (i * SPAN + lane) * WIDTH;
#pragma unroll
        for (int v = 0; v < WIDTH; ++v) {
            if (c + v >= channels) continue;
            const long long to = (block * AFFINE * p.groups + group) * p.channels + c + v;
            if (AFFINE > 0) p.partial[to] = dw[i][v];
            if (AFFINE > 1) p.partial[to + p.groups * p.channels] = db[i][v];
        }
    }
}

#endif
