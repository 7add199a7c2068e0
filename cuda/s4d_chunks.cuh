// SPDX-License-Identifier: MIT
// The scan of S4D in chunks of time, as products with small matrices on tensor cores: what the forward
// (s4d_chunks.cu) and the backward (s4d_chunks_backward.cu) share.
//
// With T steps in a chunk, S the state before it and k_d = Re sum_n v_n a_n^d,
//
//     y_j = Re sum_n v_n a_n^(j+1) S_n + sum_{i <= j} (k_{j-i} + [i = j] D) u_i
//     S'  = a^T S + E,  E = sum_j a^(T-1-j) u_j
//
// Launch. A block has GROUP neighbouring channels of eight pieces (rows, or segments of rows, that share
// parameters), PARTS warps a channel with TILES * 4 states each, whose matrices stay in registers as B operands. The
// 16 rows of an A operand are two chunks of the eight pieces, so a lane holds both chunks of a state and piece: what
// a product with u leaves (C operand) becomes the state, and that the next product's A operand, without an
// exchange. Inputs come by asynchronous copies, STAGES tiles of SPAN steps; the output goes through shared memory.
//
// Precision. A float32 number is the sum of two TF32 ones, of whose products the smallest is left out. A chain of
// products begins from zero and is added rounded to nearest, since tensor cores truncate; states never pass
// through one. a^(2T) has two parts: rounded to float32, it would err in one direction for thousands of steps.
// The output is summed by FOUR tiles, so that TILES, PARTS and GROUP change no bit of it.
//
// Compiled for DTYPE, TIMES (T), TILES, PARTS, GROUP, STAGES, SPAN, BATCH (tiles at a time), CHAIN (of them whose
// products are one chain), BACKWARD or FORWARD.
#pragma once
#include "numbers.cuh"
#include "pipeline.cuh"

using T = DTYPE;
using State = complex64;
using Wide = Complex<double>;

constexpr int PIECES = 8;  // of a block
constexpr int KT = TIMES / 8;  // tiles of a chunk's steps
constexpr int THREADS = 32 * GROUP * PARTS;
constexpr bool EXACT = sizeof(T) == 2;  // every number of a sequence is a TF32 number
constexpr int ROW = SPAN * GROUP + 16 / int(sizeof(T));  // of an input's tile, padded
constexpr int ACROSS = SPAN + 8, COLUMN = PIECES * ACROSS + 4;  // of the output's (channel, piece, step)
constexpr int FOUR = TILES < 4 ? TILES : 4;  // tiles that are one sum of the output, before all are added
constexpr int SUMS = TILES / FOUR;           // of a warp
constexpr int BLOCKS_OF_LAGS = KT * (KT + 1) / 2;  // of output and input steps of a chunk, by eights
#ifdef BACKWARD
constexpr int INPUTS = 2;  // the cotangent, u
#else
constexpr int INPUTS = 1;
#endif
static_assert(TIMES == 8 || TIMES == 16, "");
static_assert(SPAN % (2 * TIMES) == 0 && SPAN % 32 == 0, "");
static_assert(TILES % FOUR == 0 && FOUR % BATCH == 0 && BATCH % CHAIN == 0, "");

// ------------------------------------------------------------------------------ tensor cores

// x rounded to TF32.
__device__ __forceinline__ unsigned nearest_tf32(float x) {
    unsigned y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// c += a b: (16, 8) times (8, 8). Of the numbers the tensor cores read as much as TF32 holds.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// x = hi + lo, hi a TF32 number.
__device__ __forceinline__ void split(float x, unsigned& hi, float& lo) {
    hi = __float_as_uint(x) + 0x1000u & 0xffffe000u;
    lo = add(x, -__uint_as_float(hi));
}

// An A operand in two parts: of rows g and g + 8, columns t, then t + 4.
struct Left {
    unsigned hi[4], lo[4];

    // EXACTLY: x are TF32 numbers.
    template <bool EXACTLY>
    __device__ __forceinline__ void set(float x0, float x1, float x2, float x3) {
        const float x[4] = {x0, x1, x2, x3};
        float rest[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (EXACTLY)
                hi[i] = __float_as_uint(x[i]);
            else
                split(x[i], hi[i], rest[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) lo[i] = __float_as_uint(rest[i]);
    }
};

// A B operand in two parts.
struct Right {
    unsigned hi[2], lo[2];

    __device__ __forceinline__ void set(double x0, double x1) {
        hi[0] = nearest_tf32(float(x0));
        hi[1] = nearest_tf32(float(x1));
        lo[0] = nearest_tf32(float(add(x0, -double(__uint_as_float(hi[0])))));
        lo[1] = nearest_tf32(float(add(x1, -double(__uint_as_float(hi[1])))));
    }
};

// One of three products: what is small comes first.
template <bool EXACTLY>
__device__ __forceinline__ void multiply(float (&c)[4], const Left& a, const Right& b, int pass) {
    if (pass == 0) multiply(c, a.hi, b.lo[0], b.lo[1]);
    if (pass == 1 && !EXACTLY) multiply(c, a.lo, b.hi[0], b.hi[1]);
    if (pass == 2) multiply(c, a.hi, b.hi[0], b.hi[1]);
}

__device__ __forceinline__ void clear(float (&c)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] = 0;
}

// ------------------------------------------------------------------------------ arguments

struct Sequence {
    const T* data;
    long long outer, inner, time, channel;
};

struct Size {
    long long length, channels, states, inner;
    long long alike;              // rows that share a and v
    long long segment, segments;  // steps of one, and how many a row has
    long long groups;             // of pieces, of rows that share a and v
    long long onward;             // from a step of y to the next one of the forward
    long long wide;               // bits: the sequence can be copied 16 bytes at a time
};

struct Arguments {
    const State *a, *v;
    const long long* lengths;  // null: all steps
    Size size;
    Sequence in[INPUTS];
    const float* D;       // null: zeros
    const State* starts;  // ([2,] rows, segments, H, M) of s, or of m and r; null: zeros
    T* out;
#ifdef BACKWARD
    State *da, *dv;  // partial (rows, segments, H, M)
    float* dD;       // partial; null as D is
    long long pieces;  // rows times segments
#else
    State* last;
#endif
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

__device__ __forceinline__ long long smaller(long long x, long long y) { return x < y ? x : y; }

// What the block has of a piece, at the first step run: the last one that counts in a backward.
struct Piece {
    const T* in[INPUTS];
    T* out;
    long long index, row;  // of (row, segment); -1: there is no such piece
    int count, rest;       // steps that count, and those after them
    int final;             // pairs of chunks before the one in which the row ends; -1: it ends elsewhere

    __device__ __forceinline__ void find(const Arguments& p, long long copy, long long at, long long channel) {
        const Size& size = p.size;
        count = rest = 0;
        final = -1;
        row = index = -1;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) in[i] = nullptr;
        out = nullptr;
        if (at >= size.alike * size.segments) return;
        row = copy * size.alike + at / size.segments;
        const long long segment = at % size.segments, first = segment * size.segment;
        index = row * size.segments + segment;
        long long end = size.length;
        if (p.lengths) end = p.lengths[row] < 0 ? 0 : smaller(p.lengths[row], size.length);
        const long long left = smaller(end - first, size.segment);
        count = left < 0 ? 0 : int(left);
        rest = int(smaller(first + size.segment, size.length) - first) - count;
        if (end <= first + size.segment && (end > first || first == 0)) final = count / (2 * TIMES);
        const long long outer = row / size.inner, inner = row - outer * size.inner;
        const long long start = INPUTS > 1 ? first + count - 1 : first;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i) {
            const Sequence& x = p.in[i];
            in[i] = x.data + outer * x.outer + inner * x.inner + start * x.time + channel * x.channel;
        }
        out = p.out + row * size.length * size.channels + start * size.onward + channel;
    }
};

struct Shared {
    alignas(16) T in[STAGES][INPUTS][PIECES * ROW];
    alignas(16) float out[2][PARTS][GROUP * COLUMN];
    alignas(16) unsigned direct[GROUP][BLOCKS_OF_LAGS][32][4];  // k_d as B operands
    alignas(16) float over[GROUP * PARTS][TILES][4][4];  // a^T and the rest of a^(2T)
#ifdef BACKWARD
    alignas(16) float slope[GROUP * PARTS][TILES][4][2];
    float totals[4 * TILES + 4 * BLOCKS_OF_LAGS][THREADS];
    double lags[GROUP][TIMES];
#endif
    Piece pieces[PIECES];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher gives another amount of shared memory");

// ------------------------------------------------------------------------------ copies

// What a thread copies of tiles of SPAN steps: EACH channels of one step, of every HOP-th piece.
template <int EACH>
struct Seat {
    static constexpr int MANY = GROUP / EACH, HOP = THREADS / (SPAN * MANY), TURNS = HOP < PIECES ? PIECES / HOP : 1;
    static_assert(THREADS % (SPAN * MANY) == 0 && PIECES % (HOP < PIECES ? HOP : 1) == 0, "");
    int slot, step, column;
    long long offset, onward;  // from a piece's beginning to this step and column; to the next tile's

    __device__ __forceinline__ Seat(long long time, long long channel) {
        column = threadIdx.x % MANY * EACH;
        step = threadIdx.x / MANY % SPAN;
        slot = threadIdx.x / (MANY * SPAN);
        offset = step * time + column * channel;
        onward = SPAN * time;
    }
};

// Brings the tiles of a sequence to shared memory one after the other, zeros for what does not exist.
struct Loader {
    static constexpr int EACH = 16 / int(sizeof(T)) < GROUP ? 16 / int(sizeof(T)) : GROUP;
    Seat<EACH> at;

    __device__ __forceinline__ Loader(const Sequence& x) : at(INPUTS > 1 ? -x.time : x.time, x.channel) {}

    // `whole`: all of it is there, but for pieces that do not exist and are zeros already.
    __device__ __forceinline__ void fetch(T* tile, const Piece* pieces, int which, long long channel, bool wide,
                                          int columns, bool whole) {
        constexpr int BYTES = EACH * int(sizeof(T));
        T* to = tile + at.slot * ROW + at.step % SPAN * GROUP + at.column;
        if (whole) {
#pragma unroll
            for (int i = 0; i < at.TURNS; ++i) {
                if (at.HOP > PIECES && at.slot >= PIECES) break;
                const T* from = pieces[at.slot + i * at.HOP].in[which];
                if (from) copy_async<BYTES>(to + i * at.HOP * ROW, from + at.offset);
            }
        } else {
#pragma unroll 1
            for (int slot = at.slot; slot < PIECES; slot += at.HOP, to += at.HOP * ROW) {
                const T* from = pieces[slot].in[which] + at.offset;
                const int left = at.step < pieces[slot].count ? columns - at.column : 0;
                if (wide) {
                    if (left > 0)
                        copy_async<BYTES>(to, from);
                    else
                        *reinterpret_cast<typename WordOf<BYTES>::type*>(to) = {};
                } else {
#pragma unroll 1
                    for (int c = 0; c < EACH; ++c, from += channel) {
                        if (c < left)
                            copy_async<int(sizeof(T))>(to + c, from);
                        else
                            to[c] = T{};
                    }
                }
            }
        }
        at.step += SPAN;
        at.offset += at.onward;
    }
};

// Writes the output, a tile after the other: sums over the parts of a channel.
struct Writer {
    static constexpr int EACH = 4;
    Seat<EACH> at;

    __device__ __forceinline__ Writer(long long time) : at(INPUTS > 1 ? -time : time, 1) {}

    __device__ __forceinline__ Pack<T, EACH> sums(const float* from) const {
        Pack<T, EACH> out;
#pragma unroll
        for (int c = 0; c < EACH; ++c) {
            float sum = from[c * COLUMN];
#pragma unroll
            for (int part = 1; part < PARTS; ++part) sum = add(sum, from[c * COLUMN + part * GROUP * COLUMN]);
            out.item[c] = narrow<T>(sum);
        }
        return out;
    }

    // `whole`: all of it is there, but for pieces that do not exist; `aligned`: EACH numbers are stored at once.
    __device__ __forceinline__ void store(const float (*y)[GROUP * COLUMN], const Piece* pieces, bool aligned,
                                          int columns, bool whole) {
        const float* from = y[0] + at.column * COLUMN + at.slot * ACROSS + at.step % SPAN;
        if (whole) {
#pragma unroll
            for (int i = 0; i < at.TURNS; ++i) {
                if (at.HOP > PIECES && at.slot >= PIECES) break;
                T* to = pieces[at.slot + i * at.HOP].out;
                const Pack<T, EACH> out = sums(from + i * at.HOP * ACROSS);
                if (to) out.store(to + at.offset);
            }
        } else {
#pragma unroll 1
            for (int slot = at.slot; slot < PIECES; slot += at.HOP, from += at.HOP * ACROSS) {
                if (at.step >= pieces[slot].count || at.column >= columns) continue;
                T* to = pieces[slot].out + at.offset;
                const Pack<T, EACH> out = sums(from);
                if (aligned) {
                    out.store(to);
                } else {
#pragma unroll
                    for (int c = 0; c < EACH; ++c)
                        if (at.column + c < columns) to[c] = out.item[c];
                }
            }
        }
        at.step += SPAN;
        at.offset += at.onward;
    }
};

// ------------------------------------------------------------------------------ matrices

// a^n for n < 8 of a, a^2 and a^4.
__device__ __forceinline__ Wide power(Wide a, Wide a2, Wide a4, int n) {
    const Wide one = Constant<Wide>::one();
    return mul(mul(n & 1 ? a : one, n & 2 ? a2 : one), n & 4 ? a4 : one);
}

// Which of a channel's states a lane meets: in an A or C operand, and in columns of a B operand.
struct Place {
    int lane, g, t, local, part;
    long long channel, copy, states;
    bool live;

    __device__ __forceinline__ long long pair(int tile) const { return (part * TILES + tile) * 4 + t; }

    // Of the number of a pair, zero where it does not exist.
    __device__ __forceinline__ Wide read(const State* from, const Size& size, long long pair) const {
        if (!live || pair >= size.states) return Constant<Wide>::zero();
        const State x = from[(copy * size.channels + channel) * size.states + pair];
        return {x.re, x.im};
    }
};

struct Matrices {
    Right out[TILES][KT];  // state -> y: (pair, re or im; step)
    Right in[TILES][KT];   // u -> E: (step; pair, re or im)
#ifdef BACKWARD
    Right slopes[TILES][KT];  // the derivative of `in` by a
    State slope[TILES];       // T a^(T-1)
#endif
    State over[TILES];     // a^T
    State rest[TILES];     // a^(2T) - over^2

    __device__ __forceinline__ Matrices(const Arguments& p, const Place& at, double* sums, unsigned (*direct)[32][4]) {
        double k[SUMS][KT] = {};
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const Wide a = at.read(p.a, p.size, at.pair(i)), v = at.read(p.v, p.size, at.pair(i));
            const Wide a2 = mul(a, a), a4 = mul(a2, a2), a8 = mul(a4, a4);
            const Wide whole = KT == 2 ? mul(a8, a8) : a8;
            over[i] = {float(whole.re), float(whole.im)};
            const Wide rounded{over[i].re, over[i].im}, square = mul(whole, whole), theirs = mul(rounded, rounded);
            rest[i] = {float(add(square.re, -theirs.re)), float(add(square.im, -theirs.im))};
#ifdef BACKWARD
            const Wide a7 = power(a, a2, a4, 7), before = KT == 2 ? mul(a8, a7) : a7;
            slope[i] = {float(mul(double(TIMES), before.re)), float(mul(double(TIMES), before.im))};
#endif
            Wide x = mul(v, power(a, a2, a4, at.g));
#pragma unroll
            for (int n = 0; n < KT; ++n) {
                const Wide next = mul(x, a);
                k[i / FOUR][n] = add(k[i / FOUR][n], x.re);
                out[i][n].set(next.re, -next.im);
                x = mul(x, a8);
            }
            const long long other = at.pair(i) - at.t + (at.g >> 1);
            const Wide b = at.read(p.a, p.size, other), b2 = mul(b, b), b4 = mul(b2, b2);
            const bool exists = at.live && other < p.size.states, im = at.g & 1;
            // of the powers n = 3 - t, 7 - t, ... those before, n - 1
            Wide y = power(b, b2, b4, (2 - at.t) & 3), last = Constant<Wide>::zero();
            double entries[2 * KT], derivatives[2 * KT];
#pragma unroll
            for (int m = 2 * KT - 1; m >= 0; --m) {
                const int times = TIMES - 1 - (4 * m + at.t);
                const Wide before_it = at.t < 3 ? y : last, now = times ? mul(before_it, b) : Constant<Wide>::one();
                entries[m] = exists ? (im ? now.im : now.re) : 0.0;
                derivatives[m] = exists ? mul(double(times), im ? before_it.im : before_it.re) : 0.0;
                last = y;
                y = mul(y, b4);
            }
#pragma unroll
            for (int n = 0; n < KT; ++n) {
                in[i][n].set(entries[2 * n], entries[2 * n + 1]);
#ifdef BACKWARD
                slopes[i][n].set(derivatives[2 * n], derivatives[2 * n + 1]);
#endif
            }
        }
        // k_d of these four tiles, then of all
#pragma unroll
        for (int l = 0; l < SUMS; ++l)
#pragma unroll
            for (int n = 0; n < KT; ++n) {
                k[l][n] = add(k[l][n], __shfl_xor_sync(~0u, k[l][n], 1));
                k[l][n] = add(k[l][n], __shfl_xor_sync(~0u, k[l][n], 2));
                if (at.t == 0) sums[((at.local * PARTS + at.part) * SUMS + l) * TIMES + 8 * n + at.g] = k[l][n];
            }
        __syncthreads();
        if (at.part == 0) {
            const double D = p.D && at.live ? p.D[at.copy * p.size.channels + at.channel] : 0.0;
#pragma unroll 1
            for (int n = 0; n < KT; ++n)
#pragma unroll 1
                for (int m = 0; m <= n; ++m) {
                    double entries[2];
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int lag = 8 * (n - m) + at.g - at.t - 4 * half;
                        double sum = lag ? 0.0 : D;
                        if (lag >= 0)
#pragma unroll
                            for (int l = 0; l < PARTS * SUMS; ++l)
                                sum = add(sum, sums[(at.local * PARTS * SUMS + l) * TIMES + lag]);
                        entries[half] = lag < 0 ? 0.0 : sum;
                    }
                    Right x;
                    x.set(entries[0], entries[1]);
                    unsigned* to = direct[n * (n + 1) / 2 + m][at.lane];
                    to[0] = x.hi[0];
                    to[1] = x.hi[1];
                    to[2] = x.lo[0];
                    to[3] = x.lo[1];
                }
        }
        __syncthreads();
    }
};

// ------------------------------------------------------------------------------ common to both

extern __shared__ uint4 arena[];

// What a block computes.
struct Block {
    Shared& shared;
    Place at;
    int columns, warp;
    int longest, shortest;  // steps of the pieces that exist
    long long column;

    __device__ __forceinline__ Block(const Arguments& p) : shared(*reinterpret_cast<Shared*>(arena)) {
        const Size& size = p.size;
        const long long across = (size.channels + GROUP - 1) / GROUP, group = blockIdx.x / across;
        column = (blockIdx.x - group * across) * GROUP;
        columns = int(smaller(size.channels - column, GROUP));
        warp = threadIdx.x >> 5;
        at.lane = threadIdx.x & 31;
        at.g = at.lane >> 2;
        at.t = at.lane & 3;
        at.local = warp / PARTS;
        at.part = warp % PARTS;
        at.channel = column + at.local;
        at.copy = group / size.groups;
        at.live = at.channel < size.channels;
        if (threadIdx.x < PIECES)
            shared.pieces[threadIdx.x].find(p, at.copy, (group - at.copy * size.groups) * PIECES + threadIdx.x, column);
        __syncthreads();
        longest = 0;
        shortest = 0x7fffffff;
        bool all = true;
#pragma unroll 1
        for (int i = 0; i < PIECES; ++i) {
            const bool exists = shared.pieces[i].row >= 0;
            longest = max(longest, shared.pieces[i].count);
            if (exists) shortest = min(shortest, shared.pieces[i].count);
            all = all && exists;
        }
        if (all) return;
        for (int i = threadIdx.x; i < int(sizeof(shared.in) / 16); i += THREADS)
            reinterpret_cast<uint4*>(shared.in)[i] = uint4{0, 0, 0, 0};
        __syncthreads();
    }

    __device__ __forceinline__ const Piece& mine() const { return shared.pieces[at.g]; }
    __device__ __forceinline__ bool exists() const { return at.live && mine().row >= 0; }

    // The lane's states of its piece, from (..., H, M).
    __device__ __forceinline__ void read(State (&s)[TILES], const State* from, const Size& size,
                                         long long index) const {
        from += (index * size.channels + at.channel) * size.states;
#pragma unroll
        for (int i = 0; i < TILES; ++i)
            s[i] = exists() && at.pair(i) < size.states ? from[at.pair(i)] : Constant<State>::zero();
    }

    // Zeros for the steps that do not count.
    __device__ __forceinline__ void fill_rest(const Size& size) const {
#pragma unroll 1
        for (int slot = 0; slot < PIECES; ++slot) {
            const Piece& x = shared.pieces[slot];
            const long long numbers = x.rest * (long long)columns, first = INPUTS > 1 ? 1 : x.count;
            for (long long i = threadIdx.x; i < numbers; i += THREADS)
                x.out[(first + i / columns) * size.onward + i % columns] = narrow<T>(0.0f);
        }
    }
};

// Walk over the steps of the block's pieces. `body(in, out)` computes two chunks: in are the tiles of the
// inputs, PIECES * ROW apart, from the first step of the lane's piece on; out is where its warp writes.
template <class Body>
__device__ __forceinline__ void walk(const Arguments& p, const Block& block, Loader (&loaders)[INPUTS], Body& body) {
    const Size& size = p.size;
    const Place& at = block.at;
    Shared& shared = block.shared;
    Writer writer(size.onward);
    const bool aligned = size.channels % Writer::EACH == 0, all = block.columns == GROUP;
    const bool wide = all && (size.wide & (1 << INPUTS) - 1) == (1 << INPUTS) - 1;
    int now = 0;
#pragma unroll 1
    for (int k = 0; k < block.longest; k += SPAN) {
        wait_for<STAGES - 2>();
        __syncthreads();  // the tile is there; no warp needs the one before it, nor the output before the last
        const bool ahead = wide && k + STAGES * SPAN <= block.shortest;
#pragma unroll
        for (int i = 0; i < INPUTS; ++i)
            loaders[i].fetch(shared.in[now == 0 ? STAGES - 1 : now - 1][i], shared.pieces, i, p.in[i].channel,
                             size.wide >> i & 1, block.columns, ahead);
        commit();
        if (k)
            writer.store(shared.out[(k / SPAN + 1) & 1], shared.pieces, aligned, block.columns,
                         all && aligned && k <= block.shortest);
        const T* in = shared.in[now][0] + at.local;
        float* out = shared.out[(k / SPAN) & 1][at.part] + at.local * COLUMN + at.g * ACROSS + 2 * at.t;
        now = now == STAGES - 1 ? 0 : now + 1;
        body.enter(k);
#pragma unroll 1
        for (int j = 0; j < SPAN; j += 2 * TIMES, in += 2 * TIMES * GROUP, out += 2 * TIMES) body.step(in, out);
    }
    wait_for<0>();
    __syncthreads();
    if (block.longest)
        writer.store(shared.out[((block.longest + SPAN - 1) / SPAN + 1) & 1], shared.pieces, aligned, block.columns,
                     false);
}

__device__ __forceinline__ void begin(const Arguments& p, const Block& block, Loader (&loaders)[INPUTS]) {
#pragma unroll
    for (int n = 0; n < STAGES - 1; ++n) {
#pragma unroll
        for (int i = 0; i < INPUTS; ++i)
            loaders[i].fetch(block.shared.in[n][i], block.shared.pieces, i, p.in[i].channel, p.size.wide >> i & 1,
                             block.columns, false);
        commit();
    }
}

// Two chunks of a sequence as an A operand; backwards: each chunk's last step first.
__device__ __forceinline__ void operand(Left (&x)[KT], const T* from, const Place& at, bool backwards) {
#pragma unroll
    for (int n = 0; n < KT; ++n) {
        float numbers[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int step = 8 * n + (i >> 1) * 4 + at.t;
            const int offset = (i & 1) * TIMES + (backwards ? TIMES - 1 - step : step);
            numbers[i] = widen(from[at.g * ROW + offset * GROUP]);
        }
        x[n].template set<EXACT>(numbers[0], numbers[1], numbers[2], numbers[3]);
    }
}

// a^T, and what a^(2T) is beyond its square.
struct Over {
    State a, rest;

    __device__ __forceinline__ Over(const Block& block, const Matrices& matrices, int tile) {
        const Pack<float, 4> both = Pack<float, 4>::load(block.shared.over[block.warp][tile][block.at.t]);
        a = {both.item[0], both.item[1]};
        rest = {both.item[2], both.item[3]};
    }

    static __device__ __forceinline__ void save(const Block& block, const Matrices& matrices) {
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            Pack<float, 4> both;
            both.item[0] = matrices.over[i].re;
            both.item[1] = matrices.over[i].im;
            both.item[2] = matrices.rest[i].re;
            both.item[3] = matrices.rest[i].im;
            if (block.at.g == 0) both.store(block.shared.over[block.warp][i][block.at.t]);
        }
        __syncwarp();
    }
};

// out += v a^(j+1) times the states of both chunks.
__device__ __forceinline__ void read_out(float (&sum)[KT][4], const Matrices& matrices, const Left (&states)[BATCH],
                                         int first) {
    float part[BATCH / CHAIN][KT][4];
#pragma unroll
    for (int b = 0; b < BATCH / CHAIN; ++b)
#pragma unroll
        for (int n = 0; n < KT; ++n) clear(part[b][n]);
#pragma unroll
    for (int c = 0; c < CHAIN; ++c)
#pragma unroll
        for (int pass = 0; pass < 3; ++pass)
#pragma unroll
            for (int b = 0; b < BATCH / CHAIN; ++b)
#pragma unroll
                for (int n = 0; n < KT; ++n)
                    multiply<false>(part[b][n], states[b * CHAIN + c], matrices.out[first + b * CHAIN + c][n], pass);
#pragma unroll
    for (int b = 0; b < BATCH / CHAIN; ++b)
#pragma unroll
        for (int n = 0; n < KT; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[n][i] = add(sum[n][i], part[b][n][i]);
}

__device__ __forceinline__ void put(float* to, const float (&sum)[KT][4]) {
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            Pack<float, 2> out;
            out.item[0] = sum[n][2 * half];
            out.item[1] = sum[n][2 * half + 1];
            out.store(to + half * TIMES + 8 * n);
        }
}

// What inputs of the same chunk give, as the beginning of a sum; the sums of a channel share the work.
__device__ __forceinline__ void direct_path(float (&sum)[KT][4], const Block& block, const Left (&x)[KT], int which) {
    const int mine = block.at.part * SUMS + which;
#pragma unroll
    for (int n = 0; n < KT; ++n) {
        clear(sum[n]);
        if (PARTS * SUMS > 1 && ((n ^ n >> 1) & 1) != mine) continue;
#pragma unroll
        for (int m = 0; m <= n; ++m) {
            const Pack<unsigned, 4> both =
                Pack<unsigned, 4>::load(block.shared.direct[block.at.local][n * (n + 1) / 2 + m][block.at.lane]);
            const Right k{{both.item[0], both.item[1]}, {both.item[2], both.item[3]}};
#pragma unroll
            for (int pass = 0; pass < 3; ++pass) multiply<EXACT>(sum[n], x[m], k, pass);
        }
    }
}

__device__ __forceinline__ void add_to(float (&total)[KT][4], const float (&sum)[KT][4], bool first) {
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[n][i] = first ? sum[n][i] : add(total[n][i], sum[n][i]);
}

// c = x times the matrices of tiles from `first` on.
__device__ __forceinline__ void products(float (&c)[BATCH][4], const Left (&x)[KT],
                                         const Right (&matrices)[TILES][KT], int first) {
#pragma unroll
    for (int b = 0; b < BATCH; ++b) clear(c[b]);
#pragma unroll
    for (int n = 0; n < KT; ++n)
#pragma unroll
        for (int pass = 0; pass < 3; ++pass)
#pragma unroll
            for (int b = 0; b < BATCH; ++b) multiply<EXACT>(c[b], x[n], matrices[first + b][n], pass);
}
