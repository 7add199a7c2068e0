// SPDX-License-Identifier: MIT
// The scan of S4D, s_t = a s_{t-1} + u_t from zero, y_t = Re sum_n v_n s_{t,n} + D u_t, and its gradients.
//
// Memory contract. u and grad_y are (batch, L, H) with any strides, batch split in (outer, inner); reset
// (batch, L) bool with any strides; lengths (batch) int64, a and v (shared, H, M), D (shared, H), grad_last
// (batch, H, M) contiguous; y and du (batch, L, H), last (batch, H, M), kept (batch, ceil(L / chunk), H, M) contiguous.
// Strides in time may be negative, and y and du go the same way (`onward`): pointers stand at the first
// step in the order of the forward. A row stops after lengths[row] steps; y and du are zero from there on. Forward reads u and writes y (and
// kept, the state before every `chunk` steps, where asked for); backward reads u and grad_y once and writes du:
// no state comes from memory. 268 MB and 403 MB for 8192 channels of 4096 steps in float32; bound by
// arithmetic, 6 and 14 multiply-adds a complex state and step.
//
// Backward runs in reverse alone. With the cotangent g_t and adjoint states
//
//     m_t = a m_{t+1} + g_t,  r_t = a r_{t+1} + m_{t+1},  du_t = Re sum_n v_n m_t + D g_t,
//     dv_n = conj sum_t u_t m_t,  da_n = conj(v_n sum_t u_t r_t),  dD = sum_t u_t g_t
//
// since the loss is linear in u and r = dm / da. What grad_last adds is the same with m_L = conj(grad_last),
// v = 1 and no g: a second sweep of the warps that find one which is not zero.
//
// Launch. A warp is by itself: the states of a channel lie on LANES neighbouring lanes, S = PER_LANE on each, and a warp
// has 32 / LANES channels of a row, for all steps or those of a segment. Tiles of TILE steps come by
// asynchronous copies, STAGES of them under way. Outputs of TOGETHER steps are summed over lanes together.
// States are summed in one order whatever LANES is, so that a row's results depend on L, H, M, dtype and
// device alone; they are added four in a row, beginning with D u, then in pairs. da and dv of a row and segment
// go to partial sums (rows * segments, H, M), dD to (rows * segments, H), which sum.cu adds up.
//
// Segments: s4d_ends finds what each makes of a zero state, s4d_starts what state each begins with.
//
// Compiled for DTYPE, STATE (float32 ... complex128), PER_LANE, LANES, WARPS, BLOCKS, STAGES, TOGETHER and one of
// FORWARD, BACKWARD, ENDS (with ADJOINT true or false), STARTS.
#include "numbers.cuh"
#include "pipeline.cuh"

using T = DTYPE;
using Real = typename StateOf<T>::type;
using State = STATE;
using Number = Constant<State>;

// ------------------------------------------------------------------------------ real times state

// a s + u for a real u
template <class R>
__device__ __forceinline__ R advance(R a, R s, R u) {
    return fma(a, s, u);
}
template <class R>
__device__ __forceinline__ Complex<R> advance(Complex<R> a, Complex<R> s, R u) {
    return {fma(a.re, s.re, fma(-a.im, s.im, u)), fma(a.re, s.im, mul(a.im, s.re))};
}

// Re(v s), and sum + Re(v s)
template <class R>
__device__ __forceinline__ R real_part(R v, R s) {
    return mul(v, s);
}
template <class R>
__device__ __forceinline__ R real_part(Complex<R> v, Complex<R> s) {
    return fma(-v.im, s.im, mul(v.re, s.re));
}
template <class R>
__device__ __forceinline__ R real_part(R v, R s, R sum) {
    return fma(v, s, sum);
}
template <class R>
__device__ __forceinline__ R real_part(Complex<R> v, Complex<R> s, R sum) {
    return fma(-v.im, s.im, fma(v.re, s.re, sum));
}

// sum + u s for a real u
template <class R>
__device__ __forceinline__ R scaled(R u, R s, R sum) {
    return fma(u, s, sum);
}
template <class R>
__device__ __forceinline__ Complex<R> scaled(R u, Complex<R> s, Complex<R> sum) {
    return {fma(u, s.re, sum.re), fma(u, s.im, sum.im)};
}

template <class R>
__device__ __forceinline__ bool is_zero(R x) {
    return x == R(0);
}
template <class R>
__device__ __forceinline__ bool is_zero(Complex<R> x) {
    return x.re == R(0) && x.im == R(0);
}

// ------------------------------------------------------------------------------ arguments

struct Bits {
    const unsigned char* data;  // null: nothing is reset
    long long outer, inner, time;
};

struct Size {
    long long length, channels, states, inner;
    long long alike;              // rows that share a and v
    long long units, groups;      // warps that have work; of a row and segment
    long long segment, segments;  // steps of one, and how many a row has
    long long onward;             // from a step of y and du to the next one of the forward
    long long wide;               // bits: the sequence can be copied 16 bytes at a time
};

struct Common {
    const State *a, *v;
    const long long* lengths;  // null: all steps
    Bits reset;
    Size size;
};

__device__ __forceinline__ long long smaller(long long x, long long y) { return x < y ? x : y; }

// Steps of a row that count.
__device__ __forceinline__ long long end_of(const Common& p, long long row) {
    if (!p.lengths) return p.size.length;
    const long long n = p.lengths[row];
    return n < 0 ? 0 : smaller(n, p.size.length);
}

#ifndef STARTS
struct Sequence {
    const T* data;
    long long outer, inner, time, channel;
};

constexpr int S = PER_LANE;
constexpr int W = 32 / LANES;            // channels of a warp
constexpr int TILE = W == 32 ? 8 : 16;   // steps
constexpr int Q = TOGETHER < TILE ? TOGETHER : TILE;
constexpr int HELD = Q > LANES ? Q / LANES : 1;  // sums of steps that a lane has after the exchange
constexpr int NEXT_TO = S < 4 ? S : 4;   // states that are added one after the other
constexpr int THREADS = 32 * WARPS;
static_assert(TILE % Q == 0 && S % NEXT_TO == 0, "");

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

// ------------------------------------------------------------------------------ sums over states

// Sum over the lanes of a channel: neighbours first. While there is more than one number, every exchange halves
// them; a lane keeps the steps from first_of(lane) on.
template <int N, int OFFSET, int MOST>
__device__ __forceinline__ void sum_lanes(Real (&x)[MOST], int lane) {
    if constexpr (OFFSET < LANES) {
        if constexpr (N > 1) {
            const bool upper = lane & OFFSET;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const Real keep = upper ? x[i + N / 2] : x[i], give = upper ? x[i] : x[i + N / 2];
                x[i] = add(keep, __shfl_xor_sync(~0u, give, OFFSET));
            }
            sum_lanes<N / 2, 2 * OFFSET>(x, lane);
        } else {
            x[0] = add(x[0], __shfl_xor_sync(~0u, x[0], OFFSET));
            sum_lanes<1, 2 * OFFSET>(x, lane);
        }
    }
}

__device__ __forceinline__ int first_of(int part) {
    int first = 0;
#pragma unroll
    for (int offset = 1, n = Q / 2; offset < LANES && n > 0; offset *= 2, n /= 2)
        if (part & offset) first += n;
    return first;
}

__device__ __forceinline__ Real sum_tree(Real (&x)[S / NEXT_TO]) {
#pragma unroll
    for (int n = S / NEXT_TO / 2; n > 0; n /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = add(x[2 * i], x[2 * i + 1]);
    return x[0];
}

// The direct path: the first lane of a channel adds D u to its states' part.
struct Direct {
    Real D;
    bool mine;

    __device__ __forceinline__ Direct(const Real* data, const Place& at, const Size& size) {
        mine = data && at.part == 0 && at.live;
        D = mine ? data[at.row / size.alike * size.channels + at.channel] : Real(0);
    }

    __device__ __forceinline__ Real of(Real u) const { return mine ? mul(D, u) : Real(0); }
};

// first + Re sum_n v_n s_n of the lane's states.
__device__ __forceinline__ Real output(const State (&v)[S], const State (&s)[S], Real first) {
    Real sums[S / NEXT_TO];
#pragma unroll
    for (int i = 0; i < S; ++i) {
        Real& sum = sums[i / NEXT_TO];
        if (i == 0)
            sum = real_part(v[i], s[i], first);
        else
            sum = i % NEXT_TO ? real_part(v[i], s[i], sum) : real_part(v[i], s[i]);
    }
    return sum_tree(sums);
}

// Where a lane writes y or du: the steps that it holds of a group, and of single ones if it is the first.
struct Output {
    T* to;
    long long time;
    bool writes, first;

    __device__ __forceinline__ Output(T* data, const Place& at, const Size& size, bool reverse) {
        const long long start = reverse ? at.first + at.count - 1 : at.first;
        time = reverse ? -size.onward : size.onward;
        to = data + at.row * size.length * size.channels + start * size.onward + at.channel +
             first_of(at.part) * time;
        writes = at.live && at.part < Q;
        first = at.live && at.part == 0;
    }

    __device__ __forceinline__ void group(const Real (&x)[Q]) {
        if (writes) {
            T* p = to;
#pragma unroll
            for (int i = 0; i < HELD; ++i, p += time) *p = narrow<T>(x[i]);
        }
        to += Q * time;
    }

    __device__ __forceinline__ void single(Real x) {
        if (first) *to = narrow<T>(x);
        to += time;
    }
};

// Zeros for the steps of the segment that do not count.
__device__ __forceinline__ void fill_rest(T* data, const Place& at, const Size& size) {
    if (!at.live) return;
    const long long begin = at.first + at.count, after = at.after(size);
#pragma unroll 1
    for (long long t = begin + at.part; t < after; t += LANES)
        data[at.row * size.length * size.channels + t * size.onward + at.channel] =
            narrow<T>(Real(0));
}

__device__ __forceinline__ long long unit_of() {
    return blockIdx.x * (long long)WARPS + (threadIdx.x >> 5);
}
#endif

// ------------------------------------------------------------------------------ forward

#ifdef FORWARD
struct Arguments {
    Common in;
    Sequence u;
    const Real* D;        // null: zeros
    const State* starts;  // null: zeros
    T* y;
    State *last, *kept;  // kept may be null
    long long chunk;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Forward {
    const Arguments& p;
    const Place& at;
    State a[S], v[S], s[S];
    Direct direct;
    Output y;
    long long chunks;

    __device__ __forceinline__ Forward(const Arguments& p, const Place& at)
        : p(p), at(at), direct(p.D, at, p.in.size), y(p.y, at, p.in.size, false) {
        const Size& size = p.in.size;
        const long long shared = at.row / size.alike;
        at.read(a, p.in.a, size, shared);
        at.read(v, p.in.v, size, shared);
        clear();
        if (p.starts) at.read(s, p.starts, size, at.row * size.segments + at.segment);
        chunks = p.kept ? (size.length + p.chunk - 1) / p.chunk : 0;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) s[i] = Number::zero();
    }

    __device__ __forceinline__ void keep(long long chunk) {
        at.write(p.kept, s, p.in.size, at.row * chunks + chunk);
    }

    __device__ __forceinline__ void enter(long long k) {
        if (chunks && (at.first + k) % p.chunk == 0) keep((at.first + k) / p.chunk);
    }

    __device__ __forceinline__ Real step(T x) {
        const Real u = widen(x);
#pragma unroll
        for (int i = 0; i < S; ++i) s[i] = advance(a[i], s[i], u);
        return output(v, s, direct.of(u));
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        y.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(*x)};
        sum_lanes<1, 1>(sum, at.lane);
        y.single(sum[0]);
    }

    __device__ __forceinline__ void finish() {
        const Size& size = p.in.size;
        fill_rest(p.y, at, size);
        if (!at.is_last(size)) return;
        at.write(p.last, s, size, at.row);
        if (chunks)
            for (long long c = (at.end + p.chunk - 1) / p.chunk; c < chunks; ++c) keep(c);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ T arena[WARPS][STAGES * TILE * W];
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    Forward body(p, at);
    Copy<false> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
    walk<1, false>(body, arena[threadIdx.x >> 5], copies, at, p.in.reset);
    body.finish();
}
#endif

// ------------------------------------------------------------------------------ backward

#if defined(BACKWARD) || defined(FREE)
struct Arguments {
    Common in;
    Sequence u, g;
    const Real* D;                 // null: no direct path
    const State *g_last, *starts;  // starts (4, rows, segments, H, M): m, r, and those of g_last; null: one segment
    T* du;
    State *da, *dv;  // partial
    Real* dD;        // partial; null as D is
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Sums over many steps, in two levels: registers, and every FLUSH steps shared memory.
constexpr int FLUSH = 128;

struct Totals {
    State* mine;  // (2 S, THREADS), at this thread

    __device__ __forceinline__ void clear() const {
#pragma unroll
        for (int i = 0; i < 2 * S; ++i) mine[i * THREADS] = Number::zero();
    }

    __device__ __forceinline__ void flush(State (&x)[S], int which) const {
        State* to = mine + which * S * THREADS;
#pragma unroll
        for (int i = 0; i < S; ++i) {
            to[i * THREADS] = add(to[i * THREADS], x[i]);
            x[i] = Number::zero();
        }
    }

    __device__ __forceinline__ void take(State (&x)[S], int which) const {
        flush(x, which);
#pragma unroll
        for (int i = 0; i < S; ++i) x[i] = mine[(which * S + i) * THREADS];
    }
};

struct Adjoint {
    const Arguments& p;
    const Place& at;
    const Totals& totals;
    State a[S], v[S], m[S], r[S], da[S], dv[S];
    Real dD, all_dD;
    Direct direct;
    Output du;

    __device__ __forceinline__ Adjoint(const Arguments& p, const Place& at, const Totals& totals)
        : p(p),
          at(at),
          totals(totals),
          dD(0),
          all_dD(0),
          direct(p.D, at, p.in.size),
          du(p.du, at, p.in.size, true) {
        const Size& size = p.in.size;
        const long long shared = at.row / size.alike, index = at.row * size.segments + at.segment;
        at.read(a, p.in.a, size, shared);
        at.read(v, p.in.v, size, shared);
        clear();
        if (p.starts) {
            const long long all = size.units / size.groups;  // rows and segments
            at.read(m, p.starts, size, index);
            at.read(r, p.starts, size, all + index);
        }
#pragma unroll
        for (int i = 0; i < S; ++i) da[i] = dv[i] = Number::zero();
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) m[i] = r[i] = Number::zero();
    }

    __device__ __forceinline__ void enter(long long k) {
        if (k % FLUSH) return;
        totals.flush(da, 0);
        totals.flush(dv, 1);
        all_dD = add(all_dD, dD);
        dD = 0;
    }

    __device__ __forceinline__ Real step(T x, T y) {
        const Real u = widen(x), g = widen(y);
#pragma unroll
        for (int i = 0; i < S; ++i) {
            r[i] = fma(a[i], r[i], m[i]);
            m[i] = advance(a[i], m[i], g);
            dv[i] = scaled(u, m[i], dv[i]);
            da[i] = scaled(u, r[i], da[i]);
        }
        dD = fma(u, g, dD);
        return output(v, m, direct.of(g));
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W], x[TILE * W + q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        du.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(x[0], x[TILE * W])};
        sum_lanes<1, 1>(sum, at.lane);
        du.single(sum[0]);
    }
};

// What the gradient of the last state adds: e_t = a e_{t+1} is added to du.
struct Free {
    const Place& at;
    const Totals& totals;
    const State (&a)[S];
    State (&e)[S], (&r)[S], (&da)[S];
    Output du;

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) e[i] = r[i] = Number::zero();
    }

    __device__ __forceinline__ void enter(long long k) {
        if (k % FLUSH == 0) totals.flush(da, 0);
    }

    __device__ __forceinline__ Real step(T x) {
        const Real u = widen(x);
        Real sums[S / NEXT_TO];
#pragma unroll
        for (int i = 0; i < S; ++i) {
            const State one = Number::one();
            Real& sum = sums[i / NEXT_TO];
            sum = i % NEXT_TO ? add(sum, real_part(one, e[i])) : real_part(one, e[i]);
            da[i] = scaled(u, r[i], da[i]);
            r[i] = fma(a[i], r[i], e[i]);
            e[i] = mul(a[i], e[i]);
        }
        return sum_tree(sums);
    }

    __device__ __forceinline__ void group(const T* x) {
        Real sums[Q];
#pragma unroll
        for (int q = 0; q < Q; ++q) sums[q] = step(x[q * W]);
        sum_lanes<Q, 1>(sums, at.lane);
        if (du.writes) {
            const T* p = du.to;
#pragma unroll
            for (int i = 0; i < HELD; ++i, p += du.time) sums[i] = add(sums[i], Real(widen(*p)));
        }
        du.group(sums);
    }

    __device__ __forceinline__ void single(const T* x) {
        Real sum[1] = {step(*x)};
        sum_lanes<1, 1>(sum, at.lane);
        if (du.first) sum[0] = add(sum[0], Real(widen(*du.to)));
        du.single(sum[0]);
    }
};

struct Shared {
    alignas(16) T tiles[WARPS][STAGES * 2 * TILE * W];
    alignas(16) State totals[2 * S * THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher gives another amount of shared memory");

extern __shared__ uint4 arena[];

// What the sweep of g_last begins with.
__device__ __forceinline__ void begin_free(const Arguments& p, const Place& at, State (&m)[S], State (&r)[S],
                                           long long all, long long index) {
    const Size& size = p.in.size;
    if (p.starts) {
        at.read(m, p.starts, size, 2 * all + index);
        at.read(r, p.starts, size, 3 * all + index);
        return;
    }
    at.read(m, p.g_last, size, at.row);
#pragma unroll
    for (int i = 0; i < S; ++i) {
        m[i] = conj(m[i]);
        r[i] = Number::zero();
    }
}

#ifdef BACKWARD
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan_backward(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long all = size.units / size.groups, index = at.row * size.segments + at.segment;
    T* tiles = shared.tiles[threadIdx.x >> 5];
    const Totals totals{shared.totals + threadIdx.x};
    totals.clear();
    Adjoint body(p, at, totals);
    {
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}, {p.g, at, size, bool(size.wide & 2)}};
        walk<2, true>(body, tiles, copies, at, p.in.reset);
    }
    totals.take(body.da, 0);
    totals.take(body.dv, 1);
#pragma unroll
    for (int i = 0; i < S; ++i) body.dv[i] = conj(body.dv[i]);
    at.write(p.dv, body.dv, size, index);
    if (body.direct.mine) p.dD[index * size.channels + at.channel] = add(body.all_dD, body.dD);
    // the first part of da waits in place of dv; m, r and da begin again
#pragma unroll
    for (int i = 0; i < S; ++i) {
        body.dv[i] = mul(body.v[i], body.da[i]);
        body.da[i] = Number::zero();
    }
    totals.clear();
    begin_free(p, at, body.m, body.r, all, index);
    bool some = false;
#pragma unroll
    for (int i = 0; i < S; ++i) some = some || !is_zero(body.m[i]) || !is_zero(body.r[i]);
    if (__any_sync(~0u, some)) {
        Free free{at, totals, body.a, body.m, body.r, body.da, Output(p.du, at, size, true)};
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
        walk<1, true>(free, tiles, copies, at, p.in.reset);
        totals.take(body.da, 0);
    }
#pragma unroll
    for (int i = 0; i < S; ++i) body.da[i] = conj(add(body.dv[i], body.da[i]));
    at.write(p.da, body.da, size, index);
    fill_rest(p.du, at, size);
}
#endif

// The sweep of g_last alone, after s4d_chunks_backward: adds to du and da.
#ifdef FREE
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_scan_free(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long all = size.units / size.groups, index = at.row * size.segments + at.segment;
    State a[S], m[S], r[S], da[S];
    begin_free(p, at, m, r, all, index);
    bool some = false;
#pragma unroll
    for (int i = 0; i < S; ++i) some = some || !is_zero(m[i]) || !is_zero(r[i]);
    if (!__any_sync(~0u, some)) return;
    const Totals totals{shared.totals + threadIdx.x};
    totals.clear();
    at.read(a, p.in.a, size, at.row / size.alike);
#pragma unroll
    for (int i = 0; i < S; ++i) da[i] = Number::zero();
    {
        Free free{at, totals, a, m, r, da, Output(p.du, at, size, true)};
        Copy<true> copies[] = {{p.u, at, size, bool(size.wide & 1)}};
        walk<1, true>(free, shared.tiles[threadIdx.x >> 5], copies, at, p.in.reset);
    }
    totals.take(da, 0);
    State before[S];
    at.read(before, p.da, size, index);
#pragma unroll
    for (int i = 0; i < S; ++i) before[i] = add(before[i], conj(da[i]));
    at.write(p.da, before, size, index);
}
#endif
#endif

// ------------------------------------------------------------------------------ segments

#ifdef ENDS
struct Arguments {
    Common in;
    Sequence x;          // u; grad_y if ADJOINT
    State* ends;         // (rows, segments, H, M) of s, or (2, ...) of m and r
    unsigned char* cut;  // (rows, segments): whether anything is reset there
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Ends {
    State a[S], m[S], r[S];
    bool cut;

    __device__ __forceinline__ Ends(const Arguments& p, const Place& at) {
        at.read(a, p.in.a, p.in.size, at.row / p.in.size.alike);
        clear();
        cut = false;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < S; ++i) m[i] = r[i] = Number::zero();
        cut = true;
    }

    __device__ __forceinline__ void enter(long long) {}

    __device__ __forceinline__ void single(const T* x) {
        const Real u = widen(*x);
#pragma unroll
        for (int i = 0; i < S; ++i) {
            if (ADJOINT) r[i] = fma(a[i], r[i], m[i]);
            m[i] = advance(a[i], m[i], u);
        }
    }

    __device__ __forceinline__ void group(const T* x) {
#pragma unroll
        for (int q = 0; q < Q; ++q) single(x + q * W);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    s4d_ends(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ T arena[WARPS][STAGES * TILE * W];
    const Size& size = p.in.size;
    const long long unit = unit_of();
    if (unit >= size.units) return;
    const Place at(p.in, unit);
    const long long index = at.row * size.segments + at.segment;
    Ends body(p, at);
    Copy<ADJOINT> copies[] = {{p.x, at, size, bool(size.wide & 1)}};
    walk<1, ADJOINT>(body, arena[threadIdx.x >> 5], copies, at, p.in.reset);
    at.write(p.ends, body.m, size, index);
    if (ADJOINT) at.write(p.ends, body.r, size, size.units / size.groups + index);
    if (at.lane == 0 && at.group == 0) p.cut[index] = body.cut;
}
#endif

#ifdef STARTS
// One thread a state: from segment to segment, in float64.
struct Arguments {
    Common in;
    const State *ends, *g_last;  // g_last null: forward
    const unsigned char* cut;
    State* starts;  // (rows, segments, H, M); (4, ...) of m, r, and the two that g_last begins
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

template <class S>
struct WideOf {
    using type = double;
};
template <class R>
struct WideOf<Complex<R>> {
    using type = Complex<double>;
};
using Wide = typename WideOf<State>::type;

__device__ __forceinline__ double wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
template <class R>
__device__ __forceinline__ Complex<double> wide(Complex<R> x) {
    return {x.re, x.im};
}

__device__ __forceinline__ void narrow_to(float& y, double x) { y = float(x); }
__device__ __forceinline__ void narrow_to(double& y, double x) { y = x; }
template <class R>
__device__ __forceinline__ void narrow_to(Complex<R>& y, Complex<double> x) {
    y = {R(x.re), R(x.im)};
}

__device__ __forceinline__ double times(double n, double x) { return mul(n, x); }
__device__ __forceinline__ Complex<double> times(double n, Complex<double> x) {
    return {mul(n, x.re), mul(n, x.im)};
}

// What `steps` steps make of a state: a^n, and its derivative n a^(n-1).
struct Passage {
    Wide power, slope;

    __device__ __forceinline__ Passage(Wide a, long long steps) {
        Wide before = Constant<Wide>::one(), square = a;  // before = a^(n-1)
        for (long long n = steps - 1; n > 0; n >>= 1) {
            if (n & 1) before = mul(before, square);
            square = mul(square, square);
        }
        power = mul(before, a);
        slope = times(double(steps), before);
    }
};

extern "C" __global__ void __launch_bounds__(128) s4d_starts(const __grid_constant__ Arguments p) {
    const Size& size = p.in.size;
    const long long numbers = size.channels * size.states, unit = blockIdx.x * 128LL + threadIdx.x;
    if (unit >= size.units) return;
    const long long row = unit / numbers, state = unit - row * numbers;
    const long long end = end_of(p.in, row), all = size.units * size.segments;
    const Wide a = wide(p.in.a[row / size.alike * numbers + state]);
    const Passage whole(a, size.segment);
    const Wide zero = Constant<Wide>::zero();
    const bool adjoint = p.g_last;
    Wide m = zero, r = zero, e = zero, f = zero;
    if (adjoint) e = conj(wide(p.g_last[unit]));
    for (long long i = 0; i < size.segments; ++i) {
        const long long k = adjoint ? size.segments - 1 - i : i;
        const long long at = (row * size.segments + k) * numbers + state;
        narrow_to(p.starts[at], m);
        if (adjoint) {
            narrow_to(p.starts[all + at], r);
            narrow_to(p.starts[2 * all + at], e);
            narrow_to(p.starts[3 * all + at], f);
        }
        const long long count = smaller(end - k * size.segment, size.segment);
        if (count <= 0) continue;
        const Passage part = count == size.segment ? whole : Passage(a, count);
        const bool cut = p.cut[row * size.segments + k];
        const Wide power = cut ? zero : part.power, slope = cut ? zero : part.slope;
        if (adjoint) {
            r = add(wide(p.ends[all + at]), fma(power, r, mul(slope, m)));
            f = fma(power, f, mul(slope, e));
            e = mul(power, e);
        }
        m = fma(power, m, wide(p.ends[at]));
    }
}
#endif
