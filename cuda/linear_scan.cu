// SPDX-License-Identifier: MIT
// The linear scan h_i = a_i h_{i-1} + b_i and its gradients, any length, any number of rows.
//
// Memory contract. A row is one channel of one batch element; rows = batch * S. Inputs a, b (and a,
// h, grad_h backward) are (batch, L, S) with any strides, in elements; batch is split in (outer,
// inner). `time` strides are signed and the pointers stand at the first step *in the order of
// running*, so that no kernel knows of `reverse`. Outputs are contiguous (batch, L, S) and
// (batch, S), given by pointer and a signed time stride. Every input element is read once and every
// output element written once: 3 arrays forward (2 where a is constant in time), 5 backward (3);
// between blocks travel two states a tile and row, under 3 % of that. Nothing is recomputed from
// global memory. States are at least float32.
//
// Launch. Blocks of up to 32 * WARPS threads. A tile is STEPS steps a warp of ROWS = 32 * PACK rows:
// lane = rows, warp = STEPS consecutive steps. Its inputs are copied to dynamic shared memory (a and b,
// or a, h and grad_h: STEPS * warps * ROWS numbers each, or ROWS for a constant a) and passed twice
// there. Blocks stay and draw tiles from a ticket counter, all rows of the earliest steps first, so
// that a block waits only for blocks that already run. Blocks may have fewer warps where one tile
// holds the whole length.
//
// Between tiles. Each tile composes its steps to one map s -> P s + E. If the tile before it has said
// which state it left, the map is applied to that and the new state published; else the map is, and
// the block takes the newest state said by its predecessors and applies their maps to it *in the
// order of time*. Which state it finds does not change a bit of the result: s_{k+1} = P_k s_k + E_k
// is one chain of the same operations however it is cut. No float atomics; a row's result depends on its own numbers.
//
// An input may be copied 16 bytes at a time (its bit in `wide`) if its row stride is 1, S and its
// strides are multiples of 16 bytes and its pointer is aligned so; PACK > 1 asks the same for
// PACK numbers of all inputs.
//
// Compiled for one DTYPE, FORWARD or BACKWARD, and VARYING true or false (a constant in time).
#include "memory.cuh"
#include "numbers.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;
using Number = Constant<State>;
using Items = Pack<T, PACK>;

constexpr int ROWS = 32 * PACK;
constexpr int UNROLL = 8;
constexpr int WINDOW = 32;  // predecessors looked at together

struct Strided {
    const T* data;
    long long outer, inner, time, row;
};

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

__device__ __forceinline__ const T* start_of(const Strided& x, const Row& at) {
    return x.data + at.outer * x.outer + at.inner * x.inner + at.channel * x.row;
}

__device__ __forceinline__ void read(State (&s)[PACK], const Initial& x, const Row& at) {
    const State* p = x.data + at.outer * x.outer + at.inner * x.inner + at.channel * x.row;
#pragma unroll
    for (int v = 0; v < PACK; ++v) s[v] = x.data ? p[v * x.row] : Number::zero();
}

// Bit j: the state is cleared at step first + j.
__device__ __forceinline__ unsigned resets(const Bits& reset, const Row& at, long long first,
                                           int count) {
    unsigned bits = 0;
    if (reset.data) {
        const unsigned char* p =
            reset.data + at.outer * reset.outer + at.inner * reset.inner + first * reset.time;
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j)
            if (j < count) bits |= unsigned(p[j * reset.time] != 0) << j;
    }
    return bits;
}

// ------------------------------------------------------------------------------ inputs of a tile

extern __shared__ uint4 arena[];

// Copy steps [first, first + steps) of ROWS rows to `to` (steps, ROWS), as far as they exist.
__device__ __forceinline__ void fetch(T* to, const Strided& x, bool wide, int steps,
                                      long long group, long long first, long long length,
                                      const Size& size) {
    if (length - first < steps) steps = int(length - first);
    constexpr int CHUNK = 16 / sizeof(T);  // numbers
    if (wide) {
        constexpr int COLUMNS = ROWS / CHUNK;
        const int column = threadIdx.x % COLUMNS;
        const long long row = group + column * CHUNK;
        if (row < size.rows) {
            const T* from = start_of(x, locate(row, size));
            const int stride = blockDim.x / COLUMNS;
#pragma unroll 4
            for (int j = threadIdx.x / COLUMNS; j < steps; j += stride)
                copy_async<16>(to + j * ROWS + column * CHUNK, from + (first + j) * x.time);
        }
    } else {
        const int column = (threadIdx.x & 31) * PACK;
        const long long row = group + column;
        if (row < size.rows) {
            const T* from = start_of(x, locate(row, size));
#pragma unroll 4
            for (int j = threadIdx.x >> 5; j < steps; j += blockDim.x >> 5)
                copy_async<PACK * sizeof(T)>(to + j * ROWS + column, from + (first + j) * x.time);
        }
    }
}

// ------------------------------------------------------------------------------ from tile to tile

__shared__ State products[WARPS][ROWS], ends[WARPS][ROWS];  // each warp's map
__shared__ unsigned cleared[WARPS];
__shared__ State window_products[WINDOW][ROWS], window_ends[WINDOW][ROWS];
__shared__ unsigned window_cleared[WINDOW];
__shared__ State before[ROWS];  // the state before the tile
__shared__ int behind;          // how many tiles back a state is known; -1: in `before` already

struct Tile {
    unsigned id, time;  // id = time * chains + which group of rows
    int lane, warp;
};

__device__ __forceinline__ void apply(State& s, State product, State end, bool cleared) {
    s = cleared ? end : fma(product, s, end);  // an infinite s must not pass a reset
}

__device__ __forceinline__ void leave_map(const Product<State> (&product)[PACK],
                                          const State (&end)[PACK], unsigned reset,
                                          const Tile& at) {
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        products[at.warp][at.lane * PACK + v] = product[v].value();
        ends[at.warp][at.lane * PACK + v] = end[v];
    }
    const unsigned any = __ballot_sync(~0u, reset != 0);
    if (at.lane == 0) cleared[at.warp] = any;
}

static_assert(STEPS <= 32, "resets are bits of one word");
static_assert(WARPS <= WINDOW, "the sums of da use the window");

// The tile's map, from its warps' maps.
__device__ __forceinline__ unsigned compose(State (&product)[PACK], State (&end)[PACK], int lane) {
    Product<State> factors[PACK];
#pragma unroll
    for (int v = 0; v < PACK; ++v) end[v] = Number::zero();
    unsigned forgets = 0;
#pragma unroll 4
    for (int w = 0; w < blockDim.x >> 5; ++w) {
        const unsigned cut = cleared[w];
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const State c = products[w][lane * PACK + v];
            apply(end[v], c, ends[w][lane * PACK + v], cut >> lane & 1);
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

// Put a tile's map, or its state as a map that forgets, in the window; `state`: wait for the state.
__device__ __forceinline__ void hear_tile(const Exchange& x, unsigned id, int lane, int i,
                                          bool state) {
    const unsigned long long* word = x.words + size_t(id) * (2 * HALVES * ROWS) + lane * PACK;
    State product[PACK], end[PACK];
    bool states, maps, cut;
    do {  // until the lane's rows are of one kind
        states = maps = true;
        cut = false;
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const unsigned map = hear(word + v, ROWS, product[v]);
            const unsigned tag = hear(word + HALVES * ROWS + v, ROWS, end[v]);
            states &= tag == STATE;
            maps &= (tag & map & MAP) != 0;
            cut |= (tag & CLEARED) != 0;
        }
    } while (!states && (state || !maps));
#pragma unroll
    for (int v = 0; v < PACK; ++v) {
        window_products[i][lane * PACK + v] = product[v];
        window_ends[i][lane * PACK + v] = end[v];
    }
    const unsigned forgets = __ballot_sync(~0u, states || cut);
    if (lane == 0) window_cleared[i] = forgets;
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
    for (int i = at.warp; i <= back; i += blockDim.x >> 5)
        if (unsigned(i) < at.time) hear_tile(x, at.id - (i + 1) * chains, at.lane, i, i == back);
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
            apply(s[v], products[w][r], ends[w][r], cleared[w] >> at.lane & 1);
        }
    }
}

// ------------------------------------------------------------------------------ the loop of a block

// Do `work` for the tiles that this block draws.
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
    unsigned next = 0;
#pragma unroll 1
    for (unsigned round = 1; (at.id = drawn) < total; ++round) {
        at.time = at.id / unsigned(size.chains);
        const long long group = (long long)(at.id - at.time * unsigned(size.chains)) * ROWS;
        const int tile = STEPS * (blockDim.x >> 5);
        work.fetch(reinterpret_cast<T*>(arena), tile, group, (long long)at.time * tile);
        if (threadIdx.x == 0) next = draw(round);
        wait();
        __syncthreads();
        work.compute(reinterpret_cast<T*>(arena), tile, group, at);
        if (threadIdx.x == 0) drawn = next;
        __syncthreads();
    }
}

#ifdef FORWARD
struct Arguments {
    Strided a, b;
    Initial h0;
    Bits reset;
    T* h;
    long long h_time;
    State* last;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Forward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, int tile, long long group, long long first) const {
        const Size& size = p.size;
        ::fetch(to, p.b, size.wide & 2, tile, group, first, size.length, size);
        to += tile * ROWS;
        if (VARYING)
            ::fetch(to, p.a, size.wide & 1, tile, group, first, size.length, size);
        else
            ::fetch(to, p.a, size.wide & 1, 1, group, 0, 1, size);
    }

    __device__ __forceinline__ void compute(const T* from, int tile, long long group,
                                            const Tile& at) const {
        const long long row = group + at.lane * PACK;
        const bool live = row < p.size.rows;
        const Row place = locate(live ? row : p.size.rows - PACK, p.size);
        const long long first = (long long)at.time * tile + at.warp * STEPS;
        const long long left = p.size.length - first;
        const int count = left > STEPS ? STEPS : left < 0 ? 0 : int(left);
        const unsigned reset = resets(p.reset, place, first, count);
        const T* b = from + at.warp * STEPS * ROWS + at.lane * PACK;
        const T* a = VARYING ? b + tile * ROWS : from + tile * ROWS + at.lane * PACK;
        constexpr int A = VARYING ? ROWS : 0;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) end[v] = Number::zero();
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(b + j * ROWS);
            if (j < count) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    if (reset >> j & 1) end[v] = Number::zero();
                    product[v].times(widen(c.item[v]));
                    end[v] = fma(widen(c.item[v]), end[v], widen(x.item[v]));
                }
            }
        }
        leave_map(product, end, reset, at);
        enter(s, p.exchange, p.size, at, p.h0, place);

        T* h = p.h + place.batch * p.size.length * p.size.channels + first * p.h_time +
               place.channel;
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(b + j * ROWS);
            if (j < count) {
                Items y;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    if (reset >> j & 1) s[v] = Number::zero();
                    s[v] = fma(widen(c.item[v]), s[v], widen(x.item[v]));
                    y.item[v] = narrow<T>(s[v]);
                }
                if (live) y.store(h);
                h += p.h_time;
            }
        }
        if (live && count > 0 && left <= STEPS) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) p.last[row + v] = s[v];
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    linear_scan(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Forward{p});
}
#endif

#ifdef BACKWARD
// The adjoint runs the other way: lam_i = s_{i-1} + g_i, s_i = conj(a_i) lam_i (zero where reset);
// db = lam, da_i = lam_i conj(what step i received), which is h of the *next* step of this order.
struct Arguments {
    Strided a, h, g;
    Initial h0, g_last;
    Bits reset;
    T *da, *db;
    long long time;  // stride of da and db
    State *dh0, *partial;
    Exchange exchange;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Backward {
    const Arguments& p;

    __device__ __forceinline__ void fetch(T* to, int tile, long long group, long long first) const {
        const Size& size = p.size;
        ::fetch(to, p.g, size.wide & 4, tile, group, first, size.length, size);
        to += tile * ROWS;
        ::fetch(to, p.h, size.wide & 2, tile, group, first + 1, size.length, size);
        to += tile * ROWS;
        if (VARYING)
            ::fetch(to, p.a, size.wide & 1, tile, group, first, size.length, size);
        else
            ::fetch(to, p.a, size.wide & 1, 1, group, 0, 1, size);
    }

    __device__ __forceinline__ void compute(const T* from, int tile, long long group,
                                            const Tile& at) const {
        const long long row = group + at.lane * PACK;
        const bool live = row < p.size.rows;
        const Row place = locate(live ? row : p.size.rows - PACK, p.size);
        const long long first = (long long)at.time * tile + at.warp * STEPS;
        const long long left = p.size.length - first;
        const int count = left > STEPS ? STEPS : left < 0 ? 0 : int(left);
        const unsigned reset = resets(p.reset, place, first, count);
        const T* g = from + at.warp * STEPS * ROWS + at.lane * PACK;
        const T* h = g + tile * ROWS;
        const T* a = VARYING ? h + tile * ROWS : from + 2 * tile * ROWS + at.lane * PACK;
        constexpr int A = VARYING ? ROWS : 0;

        State s[PACK], end[PACK];
        Product<State> product[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) end[v] = Number::zero();
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(g + j * ROWS);
            if (j < count) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    const State w = conj(widen(c.item[v]));
                    product[v].times(w);
                    end[v] = mul(w, add(end[v], widen(x.item[v])));
                    if (reset >> j & 1) end[v] = Number::zero();
                }
            }
        }
        leave_map(product, end, reset, at);
        enter(s, p.exchange, p.size, at, p.g_last, place);

        State sum[PACK], h0[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v) sum[v] = h0[v] = Number::zero();
        if (count > 0 && left <= STEPS) read(h0, p.h0, place);
        const long long offset = place.batch * p.size.length * p.size.channels + first * p.time +
                                 place.channel;
        T *da = p.da + offset, *db = p.db + offset;
#pragma unroll UNROLL
        for (int j = 0; j < STEPS; ++j) {
            const Items c = Items::load(a + j * A), x = Items::load(g + j * ROWS);
            const Items y = Items::load(h + j * ROWS);
            if (j < count) {
                Items to_a, to_b;
                const bool cut = reset >> j & 1;
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    const State lam = add(s[v], widen(x.item[v]));
                    to_b.item[v] = narrow<T>(lam);
                    const State received = j + 1 == left ? h0[v] : State(widen(y.item[v]));
                    const State gradient = cut ? Number::zero() : mul(lam, conj(received));
                    if (VARYING)
                        to_a.item[v] = narrow<T>(gradient);
                    else
                        sum[v] = add(sum[v], gradient);
                    s[v] = cut ? Number::zero() : mul(conj(widen(c.item[v])), lam);
                }
                if (live) {
                    to_b.store(db);
                    if (VARYING) to_a.store(da);
                }
                da += p.time;
                db += p.time;
            }
        }
        if (live && count > 0 && left <= STEPS) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) p.dh0[row + v] = s[v];
        }
        if (!VARYING) {  // each warp's sum, then the tile's in the order of the warps
#pragma unroll
            for (int v = 0; v < PACK; ++v) window_ends[at.warp][at.lane * PACK + v] = sum[v];
            __syncthreads();
            if (at.warp == 0 && live) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    State total = window_ends[0][at.lane * PACK + v];
                    for (int w = 1; w < blockDim.x >> 5; ++w)
                        total = add(total, window_ends[w][at.lane * PACK + v]);
                    if (p.size.tiles > 1)
                        p.partial[at.time * p.size.rows + row + v] = total;
                    else
                        p.da[row + v] = narrow<T>(total);
                }
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    linear_scan_backward(const __grid_constant__ Arguments p) {
    draw_tiles(p.size, p.exchange.ticket, Backward{p});
}
#endif
