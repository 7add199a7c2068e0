// SPDX-License-Identifier: MIT
// How a warp walks through the steps of its channels: places, tiles of the sequences, resets.
//
// A warp is by itself: the states of a channel lie on LANES neighbouring lanes, S = PER_LANE on each, and a warp
// has 32 / LANES channels of a row, for all steps or those of a segment. Tiles of TILE steps come by
// asynchronous copies, STAGES of them under way. Outputs of TOGETHER steps are summed over lanes together.
//
// Compiled for PER_LANE, LANES, WARPS, STAGES, TOGETHER.
#pragma once
#include "pipeline.cuh"
#include "s4d_states.cuh"

struct Sequence {
    const T* data;
    long long outer, inner, time, channel;
};

constexpr int S = PER_LANE;
constexpr int W = 32 / LANES;            // channels of a warp
constexpr int TILE = W == 32 ? 8 : 16;   // steps
constexpr int Q = TOGETHER < TILE ? TOGETHER : TILE;
constexpr int THREADS = 32 * WARPS;
static_assert(TILE % Q == 0, "");

__device__ __forceinline__ long long unit_of() {
    return blockIdx.x * (long long)WARPS + (threadIdx.x >> 5);
}

// What a lane computes: channel, states [part * S, part * S + S), steps [first, first + count).
struct Place {
    long long row, segment, channel, group, first, count, end, outer, inner;
    int lane, part, column;
    bool live;  // there is such a channel

    __device__ __forceinline__ Place(const Common& p, long long unit) {
        const Size& size = p.size;
        lane = threadIdx.x & 31;
        part = lane % LANES;
        column = lane / LANES;
        const long long piece = unit / size.groups;
        group = (unit - piece * size.groups) * W;
        row = piece / size.segments;
        segment = piece - row * size.segments;
        channel = group + column;
        live = channel < size.channels;
        outer = row / size.inner;
        inner = row - outer * size.inner;
        end = end_of(p, row);
        first = segment * size.segment;
        count = smaller(end - first, size.segment);
        if (count < 0) count = 0;
    }

    __device__ __forceinline__ long long after(const Size& size) const {
        return smaller(first + size.segment, size.length);
    }

    // Whether the last step that counts is here, or there is none and this is the first segment.
    __device__ __forceinline__ bool is_last(const Size& size) const {
        return end <= first + size.segment && (end > first || first == 0);
    }

    // Of the first of the lane's states in (..., H, M), with `index` the axis before.
    __device__ __forceinline__ long long states(const Size& size, long long index) const {
        return (index * size.channels + channel) * size.states + part * S;
    }

    // How many of the lane's states exist.
    __device__ __forceinline__ int held(const Size& size) const {
        const long long left = size.states - part * S;
        return !live || left <= 0 ? 0 : left < S ? int(left) : S;
    }

    __device__ __forceinline__ void read(State (&x)[S], const State* from, const Size& size,
                                         long long index) const {
        const int n = held(size);
        from += states(size, index);
#pragma unroll
        for (int i = 0; i < S; ++i) x[i] = i < n ? from[i] : Number::zero();
    }

    __device__ __forceinline__ void write(State* to, const State (&x)[S], const Size& size,
                                          long long index) const {
        const int n = held(size);
        to += states(size, index);
#pragma unroll
        for (int i = 0; i < S; ++i)
            if (i < n) to[i] = x[i];
    }
};

// ------------------------------------------------------------------------------ tiles

// Copies the tiles of a sequence to shared memory (TILE, W), one after the other. Step 0 is the first step
// run: the last one of the row where REVERSE.
template <bool REVERSE>
struct Copy {
    static constexpr int PIECE = 16 / int(sizeof(T)) < W ? 16 / int(sizeof(T)) : W;
    const T* from;
    long long time, apart;
    int columns, lane;
    bool wide;

    __device__ __forceinline__ Copy(const Sequence& x, const Place& at, const Size& size, bool wide)
        : wide(wide) {
        const long long start = REVERSE ? at.first + at.count - 1 : at.first;
        lane = at.lane;
        time = REVERSE ? -x.time : x.time;
        apart = x.channel;
        columns = int(smaller(size.channels - at.group, W));
        const int across = wide ? W / PIECE : W, piece = wide ? PIECE : 1;
        from = x.data + at.outer * x.outer + at.inner * x.inner + start * x.time +
               lane / across * time + (at.group + lane % across * piece) * x.channel;
    }

    template <int NUMBERS, bool WHOLE>
    __device__ __forceinline__ void copy(T* tile, int count) const {
        constexpr int ACROSS = W / NUMBERS, HOP = 32 / ACROSS;
        const int row = lane / ACROSS, column = lane % ACROSS * NUMBERS;
        if (column >= columns) return;
        tile += row * W + column;
        const T* p = from;
#pragma unroll
        for (int i = 0; i < TILE; i += HOP) {
            if ((WHOLE && TILE % HOP == 0) || row + i < count) copy_async<NUMBERS * int(sizeof(T))>(tile + i * W, p);
            p += HOP * time;
        }
    }

    // The next tile, of which `left` steps exist, perhaps none.
    __device__ __forceinline__ void fetch(T* tile, long long left) {
        const int count = left < TILE ? int(left) : TILE;
        if (!wide)
            copy<1, false>(tile, count);
        else if (left >= TILE)
            copy<PIECE, true>(tile, TILE);
        else
            copy<PIECE, false>(tile, count);
        from += TILE * time;
    }
};

// The resets of a tile's steps, as bits; asked for a tile ahead.
template <bool REVERSE>
struct Resets {
    const unsigned char* from;  // null: none
    long long time;
    int lane;

    __device__ __forceinline__ Resets(const Bits& x, const Place& at) : time(REVERSE ? -x.time : x.time) {
        const long long start = REVERSE ? at.first + at.count - 1 : at.first;
        lane = at.lane;
        from = x.data ? x.data + at.outer * x.outer + at.inner * x.inner + start * x.time + lane * time
                      : nullptr;
    }

    __device__ __forceinline__ unsigned char next(long long left) {
        if (!from) return 0;
        const unsigned char flag = lane < TILE && lane < left ? *from : 0;
        from += TILE * time;
        return flag;
    }
};

// Walk through the steps of `at`. `body` has group(x, j), Q steps from step j of the tiles x; single(x, j);
// clear(); and enter(k), before the tile that begins with step k.
template <int INPUTS, bool REVERSE, class Body>
__device__ __forceinline__ void walk(Body& body, T* arena, Copy<REVERSE> (&copies)[INPUTS],
                                     const Place& at, const Bits& reset) {
    constexpr int SIZE = TILE * W;
    Resets<REVERSE> resets(reset, at);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
#pragma unroll
        for (int n = 0; n < INPUTS; ++n)
            copies[n].fetch(arena + (i * INPUTS + n) * SIZE, at.count - i * TILE);
        commit();
    }
    unsigned char flag = resets.next(at.count);
    int now = 0;
#pragma unroll 1
    for (long long k = 0; k < at.count; k += TILE) {
        wait_for<STAGES - 2>();
        __syncwarp();  // the tile is there, and no lane needs the one before it
        T* free = arena + (now == 0 ? STAGES - 1 : now - 1) * INPUTS * SIZE;
#pragma unroll
        for (int n = 0; n < INPUTS; ++n)
            copies[n].fetch(free + n * SIZE, at.count - k - (STAGES - 1) * TILE);
        commit();
        const unsigned cleared = __ballot_sync(~0u, flag);
        flag = resets.next(at.count - k - TILE);
        const T* x = arena + now * INPUTS * SIZE + at.column;
        now = now == STAGES - 1 ? 0 : now + 1;
        body.enter(k);
        const int left = at.count - k < TILE ? int(at.count - k) : TILE;
        if (left == TILE && !cleared) {
#pragma unroll 1
            for (int j = 0; j < TILE; j += Q) body.group(x + j * W);
        } else {
#pragma unroll 1
            for (int j = 0; j < left; ++j) {
                if (!REVERSE && cleared >> j & 1) body.clear();
                body.single(x + j * W);
                if (REVERSE && cleared >> j & 1) body.clear();
            }
        }
    }
    wait_for<0>();
    __syncwarp();
}
