// SPDX-License-Identifier: MIT
// A linear recurrence along time over tiles: where rows are, how a tile's inputs arrive, how tiles
// of one row hand each other their state, and the loop by which a block draws tiles.
//
// A row is one channel of one batch element. A tile is STEPS steps a warp of ROWS = 32 * PACK rows:
// lane = rows, warp = STEPS consecutive steps. Each warp composes its steps to a map s -> P s + E in
// registers (`leave_map`), gets the state before its first step (`enter`) and goes over its steps
// again from there. Blocks stay and draw tiles from a ticket counter, all rows of the earliest steps
// first, so that a block waits only for blocks that already run.
//
// Between tiles. If the tile before has said which state it left, the tile's map is applied to that
// and the new state published; else the map is, and the block takes the newest state said by its
// predecessors and applies their maps to it *in the order of time*. Which state it finds does not
// change a bit of the result: s_{k+1} = P_k s_k + E_k is one chain of the same operations however it
// is cut. No float atomics; a row's result depends on its own numbers.
//
// Definitions: DTYPE, PACK, WARPS (of a block, at most), STEPS, WINDOW (predecessors looked at
// together), AT_ONCE (of these, by one warp); STATE_TYPE where the state is not DTYPE widened.
#pragma once

#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
#ifdef STATE_TYPE
using State = STATE_TYPE;
#else
using State = typename StateOf<T>::type;
#endif
using Number = Constant<State>;
using Items = Pack<T, PACK>;

constexpr int ROWS = 32 * PACK;

static_assert(STEPS <= 32, "resets are bits of one word");
static_assert(WARPS <= WINDOW && WINDOW <= 32, "sums of a tile use the window, a lane looks at one tile");

template <class X>
struct StridedOf {
    const X* data;
    long long outer, inner, time, row;
};
using Strided = StridedOf<T>;

struct Bits {
    const unsigned char* data;  // bool; null if there is no reset
    long long outer, inner, time;
};

struct Initial {
    const State* data;  // null: zeros
    long long outer, inner, row;
};

// What blocks tell each other: for every tile the number P of its map and, next to it, E, which the
// state after the tile replaces as soon as it is known. Words as in memory.cuh, zeros at the start.
struct Exchange {
    unsigned* ticket;
    unsigned long long* words;  // (tiles, chains, 2, 32-bit halves, ROWS)
};

constexpr unsigned MAP = 1, CLEARED = 2, STATE = 4;  // tags; a cleared map forgets its argument
constexpr int HALVES = sizeof(State) / 4;

struct Size {
    long long length, channels, inner, rows;
    long long tiles, chains;  // in time, and groups of ROWS rows
    long long wide;           // bit i: input i is copied 16 bytes at a time
};

// ------------------------------------------------------------------------------ where rows are

struct Row {
    long long outer, inner, channel, batch;
};

__device__ __forceinline__ long long quotient(long long x, long long by) {
    return (x | by) >> 32 ? x / by : unsigned(x) / unsigned(by);
}

__device__ __forceinline__ Row locate(long long row, const Size& size) {
    Row at;
    at.batch = quotient(row, size.channels);
    at.channel = row - at.batch * size.channels;
    at.outer = quotient(at.batch, size.inner);
    at.inner = at.batch - at.outer * size.inner;
    return at;
}

template <class X>
__device__ __forceinline__ const X* start_of(const StridedOf<X>& x, const Row& at) {
    return x.data + at.outer * x.outer + at.inner * x.inner + at.channel * x.row;
}

__device__ __forceinline__ void read(State (&s)[PACK], const Initial& x, const Row& at) {
    const State* p = x.data + at.outer * x.outer + at.inner * x.inner + at.channel * x.row;
#pragma unroll
    for (int v = 0; v < PACK; ++v) s[v] = x.data ? p[v * x.row] : Number::zero();
}

// Bit j: set at step first + j.
__device__ __forceinline__ unsigned bits_of(const Bits& x, const Row& at, long long first,
                                            int count) {
    unsigned bits = 0;
    if (x.data) {
        const unsigned char* p = x.data + at.outer * x.outer + at.inner * x.inner + first * x.time;
#pragma unroll 8
        for (int j = 0; j < STEPS; ++j)
            if (j < count) bits |= unsigned(p[j * x.time] != 0) << j;
    }
    return bits;
}

struct Tile {
    unsigned id, time;  // id = time * chains + which group of rows
    int lane, warp;
    int steps;        // of all warps together
    long long group;  // first row
};

// The steps of one lane: rows `row` to row + PACK, steps `first` to first + count.
struct Part {
    long long row, first, left;  // left: steps to the end of time
    int count;
    bool live;  // whether these rows exist; where not, `at` is another row, never written
    Row at;

    __device__ __forceinline__ bool is_last() const { return count > 0 && left <= STEPS; }
    // Index of its first number in a contiguous (batch, L, S) array run with a stride of `time`.
    __device__ __forceinline__ long long offset(const Size& size, long long time) const {
        return at.batch * size.length * size.channels + first * time + at.channel;
    }
};

__device__ __forceinline__ Part part_of(const Tile& tile, const Size& size) {
    Part x;
    x.row = tile.group + tile.lane * PACK;
    x.live = x.row < size.rows;
    x.at = locate(x.live ? x.row : size.rows - PACK, size);
    x.first = (long long)tile.time * tile.steps + tile.warp * STEPS;
    x.left = size.length - x.first;
    x.count = x.left > STEPS ? STEPS : x.left < 0 ? 0 : int(x.left);
    return x;
}

// ------------------------------------------------------------------------------ inputs of a tile

extern __shared__ uint4 arena[];

// Copy steps [first, first + steps) of ROWS rows to `to` (steps, ROWS), as far as they exist.
template <class X>
__device__ __forceinline__ void fetch(X* to, const StridedOf<X>& x, bool wide, int steps,
                                      long long group, long long first, long long length,
                                      const Size& size) {
    if (length - first < steps) steps = int(length - first);
    constexpr int CHUNK = 16 / sizeof(X);  // numbers
    if (wide) {
        constexpr int COLUMNS = ROWS / CHUNK;
        const int column = threadIdx.x % COLUMNS;
        const long long row = group + column * CHUNK;
        if (row < size.rows) {
            const X* from = start_of(x, locate(row, size));
            const int stride = blockDim.x / COLUMNS;
#pragma unroll 4
            for (int j = threadIdx.x / COLUMNS; j < steps; j += stride)
                copy_async<16>(to + j * ROWS + column * CHUNK, from + (first + j) * x.time);
        }
    } else {
        const int column = (threadIdx.x & 31) * PACK;
        const long long row = group + column;
        if (row < size.rows) {
            const X* from = start_of(x, locate(row, size));
#pragma unroll 4
            for (int j = threadIdx.x >> 5; j < steps; j += blockDim.x >> 5)
                copy_async<PACK * sizeof(X)>(to + j * ROWS + column, from + (first + j) * x.time);
        }
    }
}

// ------------------------------------------------------------------------------ from tile to tile

__shared__ Product<State> products[WARPS][ROWS];  // each warp's map
__shared__ State ends[WARPS][ROWS];
__shared__ unsigned cleared[WARPS];
__shared__ State window_products[WINDOW][ROWS], window_ends[WINDOW][ROWS];
__shared__ unsigned window_cleared[WINDOW];
__shared__ State before[ROWS];  // the state before the tile
__shared__ int behind;          // how many tiles back a state is known; -1: in `before` already

__device__ __forceinline__ void apply(State& s, State product, State end, bool cleared) {
    s = cleared ? end : fma(product, s, end);  // an infinite s must not pass a reset
}

__device__ __forceinline__ void leave_map(const Product<State> (&product)[PACK],
                                          const State (&end)[PACK], unsigned reset,
                                          const Tile& at) {
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        products[at.warp][at.lane * PACK + v] = product[v];
        ends[at.warp][at.lane * PACK + v] = end[v];
    }
    const unsigned any = __ballot_sync(~0u, reset != 0);
    if (at.lane == 0) cleared[at.warp] = any;
}

// The tile's map, from its warps' maps.
__device__ __forceinline__ unsigned compose(State (&product)[PACK], State (&end)[PACK], int lane) {
    Product<State> factors[PACK];
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        factors[v] = Product<State>::one();
        end[v] = Number::zero();
    }
    unsigned forgets = 0;
#pragma unroll 4
    for (int w = 0; w < blockDim.x >> 5; ++w) {
        const unsigned cut = cleared[w];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const Product<State> c = products[w][lane * PACK + v];
            const State z = ends[w][lane * PACK + v];
            end[v] = cut >> lane & 1 ? z : c.map(end[v], z);
            factors[v].times(c);
        }
        forgets |= cut;
    }
#pragma unroll
    for (int v = 0; v < PACK; ++v) product[v] = factors[v].value();
    return forgets;
}

// Wait until a tile at most WINDOW back has said its state and all tiles since at least their maps, as
// far as their first row tells; return how many these are.
__device__ __forceinline__ int look_back(const Exchange& x, const Tile& at, unsigned chains) {
    const unsigned long long* word =
        x.words + (size_t(at.id - (at.lane + 1) * chains) * 2 + 1) * (HALVES * ROWS);
    unsigned tag = unsigned(at.lane) < at.time ? 0 : STATE;  // before the first tile: h0
    for (;;) {
        unsigned ignored;
        if (at.lane < WINDOW && tag != STATE) tag = hear(word, ROWS, ignored);
        const unsigned states = __ballot_sync(~0u, tag == STATE && at.lane < WINDOW);
        const unsigned maps = __ballot_sync(~0u, tag != 0);
        const int back = __ffs(int(states)) - 1;
        if (states && (maps | ~0u << back) == ~0u) return back;
    }
}

// Put the maps of the last tiles, up to the one `back` tiles back whose state is wanted, in the window:
// a state as a map that forgets. All warps share the work; each waits for AT_ONCE tiles together.
__device__ __forceinline__ void hear_window(const Exchange& x, const Tile& at, unsigned chains,
                                            int back) {
    const int warps = blockDim.x >> 5;
    const int count = unsigned(back) < at.time ? back + 1 : int(at.time);
#pragma unroll 1
    for (int base = at.warp; base < count; base += AT_ONCE * warps) {
        State product[AT_ONCE][PACK], end[AT_ONCE][PACK];
        bool forgets[AT_ONCE], ready;
        do {  // until of every tile the lane's rows are of one kind
            unsigned maps[AT_ONCE][PACK], tags[AT_ONCE][PACK];
            ready = true;
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int i = min(base + k * warps, count - 1);
                const unsigned long long* word =
                    x.words + size_t(at.id - (i + 1) * chains) * (2 * HALVES * ROWS) +
                    at.lane * PACK;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    maps[k][v] = hear(word + v, ROWS, product[k][v]);
                    tags[k][v] = hear(word + HALVES * ROWS + v, ROWS, end[k][v]);
                }
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                bool is_state = true, is_map = true, cut = false;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    is_state &= tags[k][v] == STATE;
                    is_map &= (tags[k][v] & maps[k][v] & MAP) != 0;
                    cut |= (tags[k][v] & CLEARED) != 0;
                }
                const bool wanted = min(base + k * warps, count - 1) == back;
                ready &= is_state || (is_map && !wanted);
                forgets[k] = is_state || cut;
            }
        } while (!ready);
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            const int i = base + k * warps;
            const unsigned forgetting = __ballot_sync(~0u, forgets[k]);
            if (i < count) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    window_products[i][at.lane * PACK + v] = product[k][v];
                    window_ends[i][at.lane * PACK + v] = end[k][v];
                }
                if (at.lane == 0) window_cleared[i] = forgetting;
            }
        }
    }
}

// Publish the tile's map and get the state before the tile, for all of the block into `before`.
__device__ __forceinline__ void exchange(const Exchange& x, const Size& size, const Tile& at,
                                         const Initial& h0, const Row& row) {
    const unsigned chains = unsigned(size.chains);
    const bool last = at.time + 1 == unsigned(size.tiles);
    unsigned long long* mine = x.words + size_t(at.id) * (2 * HALVES * ROWS) + at.lane * PACK;
    State product[PACK], end[PACK], s[PACK];
    unsigned forgets = 0;
    if (at.warp == 0) {
        bool known = true;
        if (at.time == 0) {
            read(s, h0, row);
        } else {  // asked for before the tile's map is composed, to hide the way there
            const unsigned long long* word =
                x.words + (size_t(at.id - chains) * 2 + 1) * (HALVES * ROWS) + at.lane * PACK;
#pragma unroll
            for (int v = 0; v < PACK; ++v) known &= hear(word + v, ROWS, s[v]) == STATE;
        }
        forgets = compose(product, end, at.lane);
        known = __all_sync(~0u, known);
        if (!last) {
            const unsigned cut = forgets >> at.lane & 1;
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                if (known) {
                    before[at.lane * PACK + v] = s[v];
                    apply(s[v], product[v], end[v], cut);
                    tell(mine + HALVES * ROWS + v, ROWS, s[v], STATE);
                } else {
                    tell(mine + v, ROWS, product[v], MAP);
                    tell(mine + HALVES * ROWS + v, ROWS, end[v], cut ? MAP | CLEARED : MAP);
                }
            }
        } else if (known) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) before[at.lane * PACK + v] = s[v];
        }
        const int back = known ? -1 : look_back(x, at, chains);
        if (at.lane == 0) behind = back;
    }
    __syncthreads();
    const int back = behind;
    if (back < 0) return;
    hear_window(x, at, chains, back);
    __syncthreads();
    if (at.warp == 0) {
        if (unsigned(back) == at.time) read(s, h0, row);
#pragma unroll 4
        for (int i = unsigned(back) == at.time ? back - 1 : back; i >= 0; --i) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) {
                const int r = at.lane * PACK + v;
                apply(s[v], window_products[i][r], window_ends[i][r],
                      window_cleared[i] >> at.lane & 1);
            }
        }
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            before[at.lane * PACK + v] = s[v];
            apply(s[v], product[v], end[v], forgets >> at.lane & 1);
            if (!last) tell(mine + HALVES * ROWS + v, ROWS, s[v], STATE);
        }
    }
    __syncthreads();
}

// Leave in s the state before this warp's first step, once every warp has left its map.
__device__ __forceinline__ void enter(State (&s)[PACK], const Exchange& x, const Size& size,
                                      const Tile& at, const Initial& h0, const Row& row) {
    __syncthreads();
    if (size.tiles > 1) {
        exchange(x, size, at, h0, row);
#pragma unroll
        for (int v = 0; v < PACK; ++v) s[v] = before[at.lane * PACK + v];
    } else {
        read(s, h0, row);
    }
#pragma unroll 2
    for (int w = 0; w < at.warp; ++w) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const int r = at.lane * PACK + v;
            s[v] = cleared[w] >> at.lane & 1 ? ends[w][r] : products[w][r].map(s[v], ends[w][r]);
        }
    }
}

// ------------------------------------------------------------------------------ the loop of a block

// For the tiles that this block draws: work.fetch(arena, tile) copies a tile's inputs, work.compute(
// arena, tile, entered) computes it and calls entered() after `enter`: only then is the next tile
// drawn, since one that is drawn early keeps its successors waiting.
template <class Work>
__device__ __forceinline__ void draw_tiles(const Size& size, unsigned* ticket, Work work) {
    __shared__ unsigned drawn;
    const unsigned total = unsigned(size.tiles * size.chains);
    // Where tiles wait for each other the order of starting is the order of tickets.
    const auto draw = [&](unsigned round) {
        return size.tiles > 1 ? atomicAdd(ticket, 1u) : blockIdx.x + round * gridDim.x;
    };
    if (threadIdx.x == 0) drawn = draw(0);
    __syncthreads();
    Tile at;
    at.lane = threadIdx.x & 31;
    at.warp = threadIdx.x >> 5;
    at.steps = STEPS * (blockDim.x >> 5);
    unsigned next = 0;
#pragma unroll 1
    for (unsigned round = 1; (at.id = drawn) < total; ++round) {
        at.time = at.id / unsigned(size.chains);
        at.group = (long long)(at.id - at.time * unsigned(size.chains)) * ROWS;
        work.fetch(reinterpret_cast<T*>(arena), at);
        wait();
        __syncthreads();
        work.compute(reinterpret_cast<T*>(arena), at, [&]() {
            if (threadIdx.x == 0) next = draw(round);
        });
        if (threadIdx.x == 0) drawn = next;
        __syncthreads();
    }
}
