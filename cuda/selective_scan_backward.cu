// SPDX-License-Identifier: MIT
// The selective scan, backward: all gradients in one pass from the end of time.
//
// With gy the gradient before the gate, lam_t = gy_t conj(C_t) + conj(decay_{t+1}) lam_{t+1} (2 gy for
// complex states), and from lam_t, h_{t-1}: the gradients of decay and gain, chained through
// discretize.cuh to A, dt, decay_dt and timesteps; those of u, B, C, D, z follow directly.
//
// Memory contract. Inputs as in selective_scan.cu, with the states `kept` before every 32nd step and
// gy, g_last. du, ddt, dz, ddecay (batch, L, E) contiguous, but for a gap after each row of ddt and dz;
// g_last (batch, segments, E, pitch) is the adjoint after each segment of time; dh0 (batch, E, pitch); dA
// (batch, segments, E, pitch), dD, dbias, down (batch, segments, E): to be summed over segments and the
// batch elements of one A. dB, dC: (blocks of a batch element, batch, L, states), to be summed over the
// blocks of a group, or where the matrix is constant (batch, segments, E, states); dtau (blocks, batch,
// L). Each element of u, dt, z, gy is read once. No atomics: every sum has a fixed order.
//
// Launch as the forward's. Chunks of 32 steps from the last to the first. A lane prepares and finishes
// elements of its own, V neighbouring channels of one of SUB steps: it copies them to shared memory ahead of
// time for itself, and no other thread waits for it. B and C are the block's, a chunk ahead. From the kept
// state a chunk is run through once to get the state before each SUB steps; then, from the last SUB steps to
// the first, these are run again with all states (and decays) in registers, and backwards. dB_t and dC_t are
// summed over the channels of a warp by exchanging halves, then over the warps in shared memory: after each
// chunk, or where ROW_SLOTS is 1 or 2 after each SUB steps.
#include "selective.cuh"

constexpr int SUB = 8;
constexpr int SUBS = CHUNK / SUB;
constexpr int WORDS = sizeof(State) / sizeof(Real);
constexpr int MATRICES = int(B_VARIES) + int(C_VARIES);
constexpr int ROW = MATRICES * N * WORDS;  // numbers of dB_t and dC_t
constexpr int REST = MATRICES * WORDS;     // of them, of one state
constexpr int ROW_STEPS = ROW_SLOTS * SUB;
static_assert(ROW_SLOTS == 1 || ROW_SLOTS == 2 || ROW_SLOTS == SUBS, "slots of SUB steps take turns");

// Sums over states, of each step and channel: for dd, di, u (or both of these), y.
constexpr int FOR_DI = 1, FOR_U = 1 + int(GAIN), FOR_Y = 2 + int(GAIN);
constexpr int VALUES = 2 + int(GAIN) + int(GATE);
constexpr int PLANE = SUB * W + 8;

// A lane prepares and finishes elements of V neighbouring channels of one of SUB steps, Q lanes those of a
// step.
constexpr int Q = W < 4 ? W : 4;
constexpr int V = W / Q;
constexpr int SLOT = THREADS * V;  // elements of SUB steps

// Gains are kept where registers are left, and found again where not.
constexpr bool KEPT_GAIN = GAIN && PACK * S * sizeof(State) <= 16;
constexpr bool SEPARATE_DI = GAIN && SPLIT_STEPS;  // it is dd otherwise

struct Arguments {
    Inputs in;
    Strided gy;
    const State *g_last, *kept;
    T *du, *ddt, *dz, *ddecay;
    State *dB, *dC, *dA, *dh0;
    Real *dD, *dbias, *down, *dtau;
    long long gap;  // between rows of ddt and of dz, beyond the width
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// Where dt is needed once, the softplus' slope takes its place.
constexpr bool IN_PLACE = SOFTPLUS && sizeof(T) == sizeof(Real) && !TIMED && !SPLIT_STEPS;

// What lanes copy for themselves. Of u, dt, decay: the chunk that is computed and, as its SUB steps are
// done, the one to come, whose first SUB steps take turns with the other's (slots 0 and 4).
struct Own {
    alignas(16) T u[SUBS + 1][SLOT];
    alignas(16) T dt[SUBS + 1][SLOT];
    alignas(16) T decay[DECAY == 2 ? SUBS + 1 : 1][DECAY == 2 ? SLOT : 1];
    alignas(16) T gy[2][SLOT];
    alignas(16) T z[2][GATE ? SLOT : 1];
};

struct Coming {  // of the chunk to come
    alignas(16) Matrix B[B_VARIES ? CHUNK * N : 1];
    alignas(16) Matrix C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
};

struct Shared {
    Own own;
    Coming coming;
    alignas(16) State B[B_VARIES ? CHUNK * N : 1];
    alignas(16) State C[C_VARIES ? CHUNK * N : 1];
    alignas(16) Real tau[TIMED ? CHUNK : 1];
    alignas(16) Real dd[WARPS][CHUNK * W];
    alignas(16) Real x[WARPS][CHUNK * W];
    alignas(16) Real di[SEPARATE_DI ? WARPS : 1][SEPARATE_DI ? CHUNK * W : 1];
    alignas(16) Real gy[WARPS][SUB * W];      // before the gate
    alignas(16) Real to_z[GATE ? SLOT : 1];   // what y is multiplied by for dz
    alignas(16) Real slope[SOFTPLUS && !IN_PLACE ? SUBS : 1][SOFTPLUS && !IN_PLACE ? SLOT : 1];
    alignas(16) Real sums[WARPS][VALUES * PLANE];
    alignas(16) State starts[SUBS][PACK * S][THREADS];  // before SUB steps
    alignas(16) Real rows[MATRICES ? WARPS * ROW_STEPS * ROW : 1];
    alignas(16) Real dtau[TIMED ? WARPS * ROW_STEPS : 1];
    alignas(16) State totals[1 + int(!B_VARIES) + int(!C_VARIES)][PACK * S][THREADS];  // A, B, C
    alignas(16) Real over_time[2 + int(DECAY == 1)][SLOT];                             // D, bias, decay
    alignas(16) Real parameters[2 + int(DECAY == 1)][CHANNELS];                        // D, bias, decay
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the launcher gives too little shared memory");

extern __shared__ uint4 arena[];

// ------------------------------------------------------------------------------ one step

// What a lane adds up over a chunk of its states; `Shared::totals` over all of time.
struct Totals {
    State A[PACK][S], B[PACK][S], C[PACK][S];
};

template <class R>
__device__ __forceinline__ void put_words(R* to, R x) {
    to[0] = x;
}
template <class R>
__device__ __forceinline__ void put_words(R* to, Complex<R> x) {
    to[0] = x.re;
    to[1] = x.im;
}

// One step backwards: the sums over a lane's states for each channel, and its share of dB_t and dC_t.
__device__ __forceinline__ void back(const Pole<State> (&pole)[PACK][S], State (&carry)[PACK][S],
                                     const Row<B_VARIES>& B, const Row<C_VARIES>& C,
                                     const State (&h)[PACK][S], const State (&before)[PACK][S],
                                     const Factors<State> (&factors)[PACK][S], const Step* steps,
                                     const Real* gy, bool cut, Totals& totals,
                                     Real (&sums)[PACK * VALUES], Real (&row)[REST ? S * REST : 1]) {
    State dB[S], dC[S];
#pragma unroll
    for (int c = 0; c < PACK; ++c) {
        const Step step = steps[c];
        const Real g = COMPLEX<State> ? mul(Real(2), gy[c]) : gy[c];
        State w[S], of_B[S], gain_dt[S], gain[S];  // the last two only where GAIN
#pragma unroll
        for (int s = 0; s < S; ++s) {
            const State b = B.at(c, s), lam = scale_add(conj(C.at(c, s)), g, carry[c][s]);
            const State received = cut ? Number::zero() : before[c][s];
            State through, to_B;
            if constexpr (GAIN) {
                const Factors<State> f =
                    KEPT_GAIN ? factors[c][s] : pole[c][s].factors(step.dd, step.di());
                const Slopes<State> slope = pole[c][s].slopes(step.dd, step.di(), f);
                through = mul(lam, conj(f.decay));
                w[s] = SCHEME == ZOH ? mul(through, conj(received))  // the slope is the decay
                                     : mul(mul(lam, conj(received)), conj(slope.decay));
                of_B[s] = mul(lam, conj(b));
                gain_dt[s] = conj(slope.gain_dt);
                gain[s] = conj(f.gain);
                totals.A[c][s] = add(scale_add(w[s], step.dd, totals.A[c][s]),
                                     mul(scale(of_B[s], step.x), conj(slope.gain_A)));
                to_B = mul(lam, gain[s]);
            } else {
                through = mul(lam, conj(factors[c][s].decay));
                w[s] = mul(through, conj(received));
                of_B[s] = lam;
                totals.A[c][s] = scale_add(w[s], step.dd, totals.A[c][s]);
                to_B = lam;
            }
            carry[c][s] = cut ? Number::zero() : through;
            if (!B_VARIES)
                totals.B[c][s] = scale_add(to_B, step.x, totals.B[c][s]);
            else
                dB[s] = c ? scale_add(to_B, step.x, dB[s]) : scale(to_B, step.x);
            const State to_C = conj(h[c][s]);
            if (!C_VARIES)
                totals.C[c][s] = scale_add(to_C, g, totals.C[c][s]);
            else
                dC[s] = c ? scale_add(to_C, g, dC[s]) : scale(to_C, g);
        }
        Real* sum = sums + c * VALUES;
        sum[0] = sum_states<0, S>(
            [&](int s, Real y) { return pole[c][s].add_times_conj(w[s], y); });
        if (GAIN)
            sum[FOR_DI] = sum_states<0, S>([&](int s, Real y) {
                return real_fma(scale(of_B[s], step.x), gain_dt[s], y);
            });
        sum[FOR_U] = sum_states<0, S>([&](int s, Real y) {
            return real_fma(of_B[s], GAIN ? gain[s] : conj(B.at(c, s)), y);
        });
        if (GATE) sum[FOR_Y] = dot(C, h[c], c);
    }
#pragma unroll
    for (int s = 0; s < S; ++s) {
        if (B_VARIES) put_words(row + s * REST, dB[s]);
        if (C_VARIES) put_words(row + s * REST + int(B_VARIES) * WORDS, dC[s]);
    }
}

// The steps of a lane's channels; the pointers stand at a step of time.
struct Steps {
    const Real *dd, *x, *di;

    __device__ __forceinline__ Steps(const Shared& shared, const Lane& me) {
        const int at = me.lane / LANES * PACK;
        dd = shared.dd[me.warp] + at;
        x = shared.x[me.warp] + at;
        di = shared.di[SEPARATE_DI ? me.warp : 0] + (SEPARATE_DI ? at : 0);
    }
    __device__ __forceinline__ Steps from(int t) const {
        Steps y = *this;
        y.dd += t * W, y.x += t * W, y.di += SEPARATE_DI ? t * W : 0;
        return y;
    }
    __device__ __forceinline__ void load_times(Step (&step)[PACK], int t) const {
        const Pack<Real, PACK> a = Pack<Real, PACK>::load(dd + t * W);
        Pack<Real, PACK> b = a;
        if (SEPARATE_DI) b = Pack<Real, PACK>::load(di + t * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) {
            step[c].dd = a.item[c];
            step[c].set_di(b.item[c]);
        }
    }
    __device__ __forceinline__ void load_inputs(Step (&step)[PACK], int t) const {
        const Pack<Real, PACK> a = Pack<Real, PACK>::load(x + t * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) step[c].x = a.item[c];
    }
    __device__ __forceinline__ void load(Step (&step)[PACK], int t) const {
        load_times(step, t);
        load_inputs(step, t);
    }
};

// One step of a lane's states with factors that are known.
__device__ __forceinline__ void follow(State (&h)[PACK][S], const Factors<State> (&f)[PACK][S],
                                       const Row<B_VARIES>& B, const Step* steps, bool cut) {
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) {
            if (cut) h[c][s] = Number::zero();
            h[c][s] = fma(f[c][s].decay, h[c][s], drive(f[c][s], B.at(c, s), steps[c].x));
        }
}

__device__ __forceinline__ void find_factors(Factors<State> (&f)[PACK][S], const Pole<State> (&pole)[PACK][S],
                                             const Step* steps) {
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) f[c][s] = pole[c][s].factors(steps[c].dd, steps[c].di());
}

// What a lane takes from shared memory for one step backwards.
struct Taken {
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    Step steps[PACK];
    Real gy[PACK];

    // All stand at the lane's numbers of the first step.
    __device__ __forceinline__ void load(const State* Bs, const State* Cs, const Steps& at_lane,
                                         const Real* gys, int i) {
        load_row(B, Bs + i * N);
        load_row(C, Cs + i * N);
        at_lane.load(steps, i);
        const Pack<Real, PACK> g = Pack<Real, PACK>::load(gys + i * W);
#pragma unroll
        for (int c = 0; c < PACK; ++c) gy[c] = g.item[c];
    }
};

// ------------------------------------------------------------------------------ sums over lanes

// Sum KEEP numbers v over the lanes that differ in the bits FROM ... of a lane's LANES, halves of them at a
// time; of an odd number both lanes keep the one in the middle. `at` says where each is to be put.
template <int FROM, int KEEP, class Put>
__device__ __forceinline__ void sum_values(Real* v, int* at, int lane, Put put) {
    if constexpr (FROM < LANES) {
        const bool upper = lane & FROM;
        constexpr int HALF = KEEP / 2, LEFT = (KEEP + 1) / 2;
#pragma unroll
        for (int i = 0; i < HALF; ++i) {
            const Real send = upper ? v[i] : v[i + LEFT], keep = upper ? v[i + LEFT] : v[i];
            v[i] = add(keep, __shfl_xor_sync(~0u, send, FROM));
            at[i] = upper ? at[i + LEFT] : at[i];
        }
        if constexpr (KEEP % 2) {
            v[HALF] = add(v[HALF], __shfl_xor_sync(~0u, v[HALF], FROM));
            at[HALF] = upper ? -1 : at[HALF];
        }
        sum_values<2 * FROM, LEFT>(v, at, lane, put);
    } else {
#pragma unroll
        for (int i = 0; i < KEEP; ++i)
            if (at[i] >= 0) put(at[i], v[i]);
    }
}

// Where number r of a state stands behind the state's first in a row (matrix, state, word).
constexpr int beside(int r) { return r / WORDS * (N * WORDS) + r % WORDS; }

// Sum the shares of dB_t and dC_t, v[s * REST + r] for s < SS, r < RR, over the channels of a warp, likewise.
template <int STAGE, int SS, int RR, class Put>
__device__ __forceinline__ void sum_rows(Real* v, int lane, int state, int at, bool owner, Put put) {
    constexpr int FROM = LANES << STAGE;
    if constexpr (FROM < 32) {
        const bool upper = lane & FROM;
        if constexpr (RR > 1) {
            constexpr int HALF = RR / 2;
#pragma unroll
            for (int s = 0; s < SS; ++s)
#pragma unroll
                for (int r = 0; r < HALF; ++r) {
                    Real &low = v[s * REST + r], high = v[s * REST + r + HALF];
                    const Real send = upper ? low : high, keep = upper ? high : low;
                    low = add(keep, __shfl_xor_sync(~0u, send, FROM));
                }
            sum_rows<STAGE + 1, SS, HALF>(v, lane, state, at + (upper ? beside(HALF) : 0), owner, put);
        } else if constexpr (SS > 1) {
#pragma unroll
            for (int s = 0; s < SS / 2; ++s) {
                Real &low = v[s * REST], high = v[(s + SS / 2) * REST];
                const Real send = upper ? low : high, keep = upper ? high : low;
                low = add(keep, __shfl_xor_sync(~0u, send, FROM));
            }
            sum_rows<STAGE + 1, SS / 2, 1>(v, lane, state + (upper ? SS / 2 : 0), at, owner, put);
        } else {
            v[0] = add(v[0], __shfl_xor_sync(~0u, v[0], FROM));
            sum_rows<STAGE + 1, 1, 1>(v, lane, state, at, owner && !upper, put);
        }
    } else {
        if (owner)
#pragma unroll
            for (int s = 0; s < SS; ++s)
#pragma unroll
                for (int r = 0; r < RR; ++r) put(s + state, at + beside(r), v[s * REST + r]);
    }
}

// ------------------------------------------------------------------------------ elements of a lane

template <class X, class Y>
struct Same {
    static constexpr bool value = false;
};
template <class X>
struct Same<X, X> {
    static constexpr bool value = true;
};

template <class X>  // of V numbers in one access
constexpr int ACROSS = V * int(sizeof(X)) <= 16 ? V : 16 / int(sizeof(X));

template <class X>
__device__ __forceinline__ void load_elements(X (&x)[V], const X* p) {
#pragma unroll
    for (int v = 0; v < V; v += ACROSS<X>) {
        const Pack<X, ACROSS<X>> y = Pack<X, ACROSS<X>>::load(p + v);
#pragma unroll
        for (int i = 0; i < ACROSS<X>; ++i) x[v + i] = y.item[i];
    }
}

template <class X>
__device__ __forceinline__ void load_widened(Real (&x)[V], const X* p) {
    constexpr bool PAIRS = Same<X, bfloat16>::value && V % 2 == 0;
    if constexpr (PAIRS) {  // a shift and a mask
        constexpr int WORDS_ACROSS = ACROSS<X> / 2;
#pragma unroll
        for (int v = 0; v < V; v += ACROSS<X>) {
            const auto y = Pack<unsigned, WORDS_ACROSS>::load(reinterpret_cast<const unsigned*>(p + v));
#pragma unroll
            for (int i = 0; i < WORDS_ACROSS; ++i) {
                x[v + 2 * i] = __uint_as_float(y.item[i] << 16);
                x[v + 2 * i + 1] = __uint_as_float(y.item[i] & 0xffff0000u);
            }
        }
    } else {
        X narrow_x[V];
        load_elements(narrow_x, p);
#pragma unroll
        for (int v = 0; v < V; ++v) x[v] = widen(narrow_x[v]);
    }
}

template <class X>
__device__ __forceinline__ void store_elements(X* p, const X (&x)[V]) {
#pragma unroll
    for (int v = 0; v < V; v += ACROSS<X>) {
        Pack<X, ACROSS<X>> y;
#pragma unroll
        for (int i = 0; i < ACROSS<X>; ++i) y.item[i] = x[v + i];
        y.store(p + v);
    }
}

// A store that the compiler does not take apart.
template <class X, int COUNT>
__device__ __forceinline__ void write_whole(X* p, const Pack<X, COUNT>& x) {
    if constexpr (sizeof(x.word) == 16)
        asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.word.x), "r"(x.word.y),
                     "r"(x.word.z), "r"(x.word.w)
                     : "memory");
    else if constexpr (sizeof(x.word) == 8)
        asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(x.word.x), "r"(x.word.y) : "memory");
    else
        x.store(p);
}

// Do lanes' elements stand at multiples of V in a compact sequence?
__device__ __forceinline__ bool in_whole_elements(const Size& size) {
    return V == 1 || (size.width % V == 0 && size.piece % V == 0);
}

// Into a compact sequence (batch, L, E); p stands at the lane's first element.
__device__ __forceinline__ void write_elements(T* p, const Real (&x)[V], bool even, int live) {
    T y[V];
#pragma unroll
    for (int v = 0; v < V; ++v) y[v] = narrow<T>(x[v]);
    if (even && live >= V) {
#pragma unroll
        for (int v = 0; v < V; v += ACROSS<T>) {
            Pack<T, ACROSS<T>> z;
#pragma unroll
            for (int i = 0; i < ACROSS<T>; ++i) z.item[i] = y[v + i];
            write_whole(p + v, z);
        }
    } else {
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (v < live) p[v] = y[v];
    }
}

struct Elements {
    int row;            // of SUB steps; there are none from SUB on
    int warp, in_warp;  // where the first stands in arrays of a warp's SUB steps
    int channel;        // of the block: the first
    int live;           // channels of V that exist
    int slot;           // where the first stands in `Own`

    __device__ __forceinline__ Elements(const Place& at, const Lane& me) {
        row = me.lane / Q;
        warp = me.warp;
        in_warp = me.lane * V;
        channel = me.warp * W + me.lane % Q * V;
        live = at.live - channel;
        slot = threadIdx.x * V;
    }
    __device__ __forceinline__ bool works() const { return Q * SUB == 32 || row < SUB; }
};

// One of u, dt, z, decay_dt, gy, from a lane's element of the segment's first SUB steps on.
struct Sequence {
    const T* start;
    long long time, column;

    __device__ __forceinline__ Sequence(const Strided& x, const Place& at, const Elements& mine)
        : start(start_of(x, at) + mine.channel * x.row + (at.first + mine.row) * x.time),
          time(x.time), column(x.row) {}

    // Start to copy the elements of the SUB steps from `first` on, if there are any.
    __device__ __forceinline__ void copy(T* to, long long first, int live, bool whole) const {
        const T* from = start + first * time;
        if (whole) {
#pragma unroll
            for (int v = 0; v < V; v += ACROSS<T>) copy_async<ACROSS<T> * sizeof(T)>(to + v, from + v);
        } else {
#pragma unroll 1
            for (int v = 0; v < V && v < live; ++v) copy_async<sizeof(T)>(to + v, from + v * column);
        }
    }
};

struct Sequences {
    Sequence u, dt, decay, gy, z;
    int live;
    bool whole;  // 16 bytes at a time

    __device__ __forceinline__ Sequences(const Arguments& p, const Place& at, const Elements& mine)
        : u(p.in.u, at, mine), dt(p.in.dt, at, mine), decay(p.in.decay_dt, at, mine),
          gy(p.gy, at, mine), z(p.in.z, at, mine), live(mine.works() ? mine.live : 0) {
        constexpr long long BITS = WIDE_u | WIDE_dt | WIDE_gy | (GATE ? WIDE_z : 0) |
                                   (DECAY == 2 ? WIDE_decay : 0);
        whole = live >= V && (V == 1 || (p.in.size.wide & BITS) == BITS);
    }
    // What the steps are made from.
    __device__ __forceinline__ void copy_steps(Own& to, int slot, const Elements& mine,
                                               long long first, long long length) const {
        if (first + mine.row >= length) return;
        u.copy(to.u[slot] + mine.slot, first, live, whole);
        dt.copy(to.dt[slot] + mine.slot, first, live, whole);
        if (DECAY == 2) decay.copy(to.decay[slot] + mine.slot, first, live, whole);
    }
    // Those that the output's gradient needs.
    __device__ __forceinline__ void copy_outputs(Own& to, int slot, const Elements& mine,
                                                 long long first, long long length) const {
        if (first + mine.row >= length) return;
        gy.copy(to.gy[slot] + mine.slot, first, live, whole);
        if (GATE) z.copy(to.z[slot] + mine.slot, first, live, whole);
    }
};

// softplus(x), and its derivative
__device__ __forceinline__ float softplus_and_slope(float x, float& slope) {
    const float e = exponential_within(fmaxf(-fabsf(x), -104.0f));
    slope = mul(inverse(add(1.0f, e)), x < 0 ? e : 1.0f);
    return add(x < 0 ? 0.0f : x, log1p_unit(e));
}
__device__ __forceinline__ double softplus_and_slope(double x, double& slope) {
    slope = sigmoid(x);
    return softplus(x);
}

// Where the softplus' slope at a lane's elements is kept.
__device__ __forceinline__ Real* slopes_of(Shared& shared, int j, int slot, const Elements& mine) {
    if constexpr (IN_PLACE)
        return reinterpret_cast<Real*>(shared.own.dt[slot] + mine.slot);
    else
        return shared.slope[SOFTPLUS ? j : 0] + (SOFTPLUS ? mine.slot : 0);
}

// u, dt, and what else the steps of a lane's elements come from.
struct Loaded {
    Real u[V], dt[V], decay[V];
    Real tau;

    __device__ __forceinline__ void load(const Shared& shared, int j, int slot, const Elements& mine) {
        load_widened(u, shared.own.u[slot] + mine.slot);
        load_widened(dt, shared.own.dt[slot] + mine.slot);
        if (DECAY == 2) load_widened(decay, shared.own.decay[slot] + mine.slot);
        tau = TIMED && mine.works() ? shared.tau[TIMED ? j * SUB + mine.row : 0] : Real(1);
    }
    __device__ __forceinline__ Real own(int v, const Shared& shared, const Elements& mine) const {
        return DECAY == 2   ? decay[v]
               : DECAY == 1 ? shared.parameters[DECAY == 1 ? 2 : 0][mine.channel + v]
                            : Real(0);
    }
};

// Write the steps of SUB steps of time, of which `count` exist.
__device__ __forceinline__ void prepare(Shared& shared, int j, int slot, const Loaded& x,
                                        const Elements& mine, int count) {
    if (!mine.works()) return;
    Real slope[V], bias[V], dd[V], di[V], taken[V];
    load_elements(bias, static_cast<const Real*>(shared.parameters[1] + mine.channel));
    const bool exists = mine.row < count;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        Deltas d;
        d.raw = add(x.dt[v], bias[v]);
        d.delta = SOFTPLUS ? softplus_and_slope(d.raw, slope[v]) : d.raw;
        finish_deltas(d, x.own(v, shared, mine), x.tau);
        const Step found = step_of(d, x.u[v], exists);
        dd[v] = found.dd, di[v] = found.di(), taken[v] = found.x;
    }
    const int to = j * SUB * W + mine.in_warp;
    if (SOFTPLUS) store_elements(slopes_of(shared, j, slot, mine), slope);
    store_elements(shared.dd[mine.warp] + to, dd);
    store_elements(shared.x[mine.warp] + to, taken);
    if (SEPARATE_DI) store_elements(shared.di[SEPARATE_DI ? mine.warp : 0] + (SEPARATE_DI ? to : 0), di);
}

// Write the gradient before the gate, and what y is multiplied by for dz.
__device__ __forceinline__ void gate(Shared& shared, int j, const Elements& mine) {
    if (!mine.works()) return;
    Real g[V], z[V], to_z[V];
    load_widened(g, shared.own.gy[j % 2] + mine.slot);
    if (GATE) {
        load_widened(z, shared.own.z[GATE ? j % 2 : 0] + (GATE ? mine.slot : 0));
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Real s = sigmoid(z[v]);
            to_z[v] = mul(g[v], mul(s, fma(z[v], add(Real(1), -s), Real(1))));
            g[v] = mul(g[v], mul(z[v], s));
        }
        store_elements(shared.to_z + (GATE ? mine.slot : 0), to_z);
    }
    store_elements(shared.gy[mine.warp] + mine.in_warp, g);
}

// What a lane adds up over a chunk of its elements; `Shared::over_time` over all of time.
struct Sums {
    Real D[V], bias[V], own[V];
};

// The gradients of SUB steps' elements, of which `left` exist: `row` is the first of them among all batch
// elements', `channel` the block's. Returns the lane's share of the gradient of the timestep.
__device__ __forceinline__ Real finish(Shared& shared, const Arguments& p, int j, int slot,
                                       const Elements& mine, Sums& over, bool even, long long left,
                                       long long row, long long channel) {
    if (!mine.works() || mine.row >= left) return Real(0);
    Real dd[V], of_u[V], of_di[V], y[V], gy[V], to_z[V], slope[V], D[V];
    Real step[V];
    Loaded x;
    const Real* sums = shared.sums[mine.warp] + mine.in_warp;
    load_elements(dd, sums);
    if (GAIN) load_elements(of_di, sums + FOR_DI * PLANE);
    load_elements(of_u, sums + FOR_U * PLANE);
    if (GATE) load_elements(y, sums + FOR_Y * PLANE);
    load_elements(gy, static_cast<const Real*>(shared.gy[mine.warp] + mine.in_warp));
    if (GATE) load_elements(to_z, static_cast<const Real*>(shared.to_z + (GATE ? mine.slot : 0)));
    if (SOFTPLUS) load_elements(slope, static_cast<const Real*>(slopes_of(shared, j, slot, mine)));
    load_elements(step, static_cast<const Real*>(shared.dd[mine.warp] + j * SUB * W + mine.in_warp));
    load_elements(D, static_cast<const Real*>(shared.parameters[0] + mine.channel));
    x.load(shared, j, slot, mine);
    Real du[V], ddt[V], ddecay[V], dz[V], g_tau = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
        const Real u = x.u[v];
        Deltas d;
        if (TIMED || SPLIT_STEPS)
            d = deltas(x.dt[v], shared.parameters[1][mine.channel + v], x.own(v, shared, mine), x.tau);
        else
            d.dd = d.di = step[v];
        Real g_dd = Pole<State>::unscale(dd[v]), g_di, g_u;
        if (GAIN) {
            g_di = of_di[v];
            g_u = of_u[v];
        } else {
            g_di = SCHEME == MAMBA ? mul(of_u[v], u) : Real(0);
            g_u = SCHEME == MAMBA ? mul(of_u[v], d.di) : of_u[v];
        }
        du[v] = fma(D[v], gy[v], g_u);
        over.D[v] = fma(gy[v], u, over.D[v]);
        if (GATE) dz[v] = mul(to_z[v], fma(D[v], u, COMPLEX<State> ? mul(Real(2), y[v]) : y[v]));
        if (TIMED) {
            g_tau = fma(g_dd, d.own, g_tau);
            g_dd = mul(x.tau, g_dd);
            if (!STATE_ONLY) {
                g_tau = fma(g_di, d.delta, g_tau);
                g_di = mul(x.tau, g_di);
            }
        }
        if (DECAY == 0) g_di = add(g_di, g_dd);
        if (DECAY == 1) over.own[v] = add(over.own[v], g_dd);
        ddecay[v] = g_dd;
        ddt[v] = SOFTPLUS ? mul(g_di, slope[v]) : g_di;
        over.bias[v] = add(over.bias[v], ddt[v]);
    }
    row += mine.row, channel += mine.channel;
    const long long to = row * p.in.size.width + channel, apart = to + row * p.gap;
    write_elements(p.du + to, du, even, mine.live);
    if (GATE) write_elements(p.dz + apart, dz, even, mine.live);
    if (DECAY == 2) write_elements(p.ddecay + to, ddecay, even, mine.live);
    write_elements(p.ddt + apart, ddt, even, mine.live);
    return g_tau;
}

// ------------------------------------------------------------------------------ sums over warps

// Sum over warps the rows of `steps` steps from the segment's step `first` on, and write what exists.
template <int STEPS>
__device__ __forceinline__ void write_rows(const Shared& shared, const Arguments& p, const Place& at,
                                           long long first, long long length, long long row_at,
                                           int slot) {
    constexpr int WIDE = 16 / int(sizeof(Real)) < N * WORDS ? 16 / int(sizeof(Real)) : N * WORDS;
    const long long width = p.in.size.states * WORDS;  // of a row in memory
    const long long left = length - first;
    if (MATRICES) {
        const bool aligned = width % WIDE == 0;
        Real* const to = reinterpret_cast<Real*>(B_VARIES ? p.dB : p.dC);
#pragma unroll
        for (int l = 0; l < (STEPS * ROW / WIDE + THREADS - 1) / THREADS; ++l) {
            const int i = (l * THREADS + threadIdx.x) * WIDE, t = i / ROW, k = i % ROW, n = k % (N * WORDS);
            if ((STEPS * ROW / WIDE) % THREADS && i >= STEPS * ROW) break;
            const Real* from = shared.rows + slot * SUB * ROW + i;
            Pack<Real, WIDE> warp[WARPS], sum;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) warp[w] = Pack<Real, WIDE>::load(from + w * ROW_STEPS * ROW);
#pragma unroll
            for (int v = 0; v < WIDE; ++v) sum.item[v] = tree<WARPS>([&](int w) { return warp[w].item[v]; });
            if (t >= left) continue;
            Real* x = (MATRICES == 2 && k >= N * WORDS ? reinterpret_cast<Real*>(p.dC) : to) +
                      (row_at + first + t) * width + n;
            if (aligned) {
                if (n < width) sum.store(x);
            } else {
#pragma unroll
                for (int v = 0; v < WIDE; ++v)
                    if (n + v < width) x[v] = sum.item[v];
            }
        }
    }
    if (TIMED)
        for (int t = threadIdx.x; t < STEPS && t < left; t += THREADS)
            p.dtau[row_at + first + t] = tree<WARPS>(
                [&](int w) { return shared.dtau[w * ROW_STEPS + slot * SUB + t]; });
}

// ------------------------------------------------------------------------------ the kernel

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    selective_scan_backward(const __grid_constant__ Arguments p) {
    Shared& shared = *reinterpret_cast<Shared*>(arena);
    const Inputs& in = p.in;
    const Size& size = in.size;
    const Place at = locate(size);
    const Lane me = lane_of(size, at);
    const Elements mine(at, me);
    const long long length = at.length, chunks = (length + CHUNK - 1) / CHUNK;  // of the segment
    const long long kept = at.batch * ((size.length + CHUNK - 1) / CHUNK) + at.first / CHUNK;
    clear<THREADS>(shared.own);
    clear<THREADS>(shared.coming);
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) {
        const long long parameter = at.shared * size.width + at.channel + i;
        const bool exists = i < at.live;
        shared.parameters[0][i] = exists && in.D ? in.D[parameter] : Real(0);
        shared.parameters[1][i] = exists && in.bias ? in.bias[parameter] : Real(0);
        if (DECAY == 1)
            shared.parameters[DECAY == 1 ? 2 : 0][i] = exists ? constant_decay(in.decay_dt, at, i) : Real(0);
    }
    for (Real(&total)[SLOT] : shared.over_time)
        for (int v = 0; v < V; ++v) total[mine.slot + v] = Real(0);
    for (State(&total)[PACK * S][THREADS] : shared.totals)
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) total[i][threadIdx.x] = Number::zero();
    __syncthreads();

    Pole<State> pole[PACK][S];
    State carry[PACK][S];
    Row<B_VARIES> B;
    Row<C_VARIES> C;
    load_states(carry, in.A + states_at(size, at.shared, at, me), size, me);
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s) pole[c][s] = Pole<State>(carry[c][s]);
    load_states(carry, p.g_last + states_at(size, at.row, at, me), size, me);
    load_constant(B, in.B, at, me);
    load_constant(C, in.C, at, me);

    Totals totals;
    Sums over;
#pragma unroll
    for (int c = 0; c < PACK; ++c)
#pragma unroll
        for (int s = 0; s < S; ++s)
            totals.A[c][s] = totals.B[c][s] = totals.C[c][s] = Number::zero();
#pragma unroll
    for (int v = 0; v < V; ++v) over.D[v] = over.bias[v] = over.own[v] = Real(0);

    const Sequences sequences(p, at, mine);
    const Copies copies(in, at);
    const auto fetch = [&](long long first) {
        Coming& to = shared.coming;
        copies.times<CHUNK>(to.tau, first);
        constexpr long long BITS = (B_VARIES ? WIDE_B : 0) | (C_VARIES ? WIDE_C : 0);
        const int states = int(size.states);
        if (Copies::Rows::POSSIBLE && copies.whole<CHUNK>(first, BITS)) {
            if (B_VARIES) copies.run<CHUNK, Copies::Rows::POSSIBLE>(to.B, copies.B, 1, states, first);
            if (C_VARIES) copies.run<CHUNK, Copies::Rows::POSSIBLE>(to.C, copies.C, 1, states, first);
        } else {
            if (B_VARIES) copies.run<CHUNK, false>(to.B, copies.B, 1, states, first);
            if (C_VARIES) copies.run<CHUNK, false>(to.C, copies.C, 1, states, first);
        }
    };
    // slot of the SUB steps j of a chunk
    const auto slot_of = [](long long chunk, int j) { return j ? j : chunk % 2 ? SUBS : 0; };

    fetch((chunks - 1) * CHUNK);
#pragma unroll 1
    for (int j = 0; j < SUBS; ++j)
        sequences.copy_steps(shared.own, slot_of(chunks - 1, j), mine,
                             (chunks - 1) * CHUNK + j * SUB, length);
    sequences.copy_outputs(shared.own, (SUBS - 1) % 2, mine, chunks * CHUNK - SUB, length);
    commit();

    const long long blocks = size.width / size.piece * size.parts;
    const long long batches = gridDim.x / (blocks * size.segments);
    const long long row_at = (at.part * batches + at.batch) * size.length + at.first;
    const long long row = at.batch * size.length + at.first;
    const bool even = in_whole_elements(size) && p.gap % V == 0;
#pragma unroll 1
    for (long long chunk = chunks - 1;; --chunk) {
        const long long first = chunk * CHUNK;
        State h[PACK][S];
        if (chunk >= 0) load_states(h, p.kept + states_at(size, kept + chunk, at, me), size, me);
        wait_for<0>();
        __syncthreads();  // B and C are there, and nobody needs the ones before or writes rows
        if (chunk + 1 < chunks)
            write_rows<ROW_SLOTS == SUBS ? CHUNK : SUB>(shared, p, at, first + CHUNK, length, row_at, 0);
        if (chunk < 0) break;
        const int count = length - first < CHUNK ? int(length - first) : CHUNK;
        const unsigned cleared = RESET ? resets(in.reset, at, first) : 0;
        if (B_VARIES) widen_rows<CHUNK * N>(shared.B, shared.coming.B);
        if (C_VARIES) widen_rows<CHUNK * N>(shared.C, shared.coming.C);
        if (TIMED) {
            for (int t = threadIdx.x; t < CHUNK; t += THREADS) shared.tau[t] = shared.coming.tau[t];
            __syncthreads();
        }
        {
            Loaded x[SUBS];
#pragma unroll
            for (int j = 0; j < SUBS; ++j) x[j].load(shared, j, slot_of(chunk, j), mine);
#pragma unroll
            for (int j = 0; j < SUBS; ++j)
                prepare(shared, j, slot_of(chunk, j), x[j], mine, count - j * SUB);
        }
        __syncthreads();
        if (chunk > 0) fetch(first - CHUNK);
        commit();

        const Steps at_lane(shared, me);
        const State* Bs = shared.B + (B_VARIES ? me.first : 0);
        const State* Cs = shared.C + (C_VARIES ? me.first : 0);
        // the state before each SUB steps
#pragma unroll 1
        for (int j = 0; j < SUBS; ++j) {
#pragma unroll
            for (int i = 0; i < PACK * S; ++i) shared.starts[j][i][threadIdx.x] = h[i / S][i % S];
            if (j == SUBS - 1) break;
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, Bs + t * N);
                Step step[PACK];
                at_lane.load(step, t);
                Factors<State> factors[PACK][S];
                find_factors(factors, pole, step);
                follow(h, factors, B, step, RESET && cleared >> t & 1);
            }
        }
#pragma unroll 1
        for (int j = SUBS - 1; j >= 0; --j) {
            // SUB steps ahead: gy and z, and the coming chunk's u and dt in place of what is done
            const int slot = slot_of(chunk, j), next = j == SUBS - 1 ? 0 : j + 1;
            if (j > 0 || chunk > 0)
                sequences.copy_outputs(shared.own, (j + 1) % 2, mine, first + (j - 1) * SUB, length);
            if (chunk > 0)
                sequences.copy_steps(shared.own, slot_of(chunk - 1, next), mine,
                                     first - CHUNK + next * SUB, length);
            commit();
            if (j * SUB >= count) continue;
            wait_for<1>();
            gate(shared, j, mine);
            State start[PACK][S], hs[SUB][PACK][S];
            Factors<State> factors[SUB][PACK][S];
#pragma unroll
            for (int i = 0; i < PACK * S; ++i)
                h[i / S][i % S] = start[i / S][i % S] = shared.starts[j][i][threadIdx.x];
#pragma unroll
            for (int i = 0; i < SUB; ++i) {
                const int t = j * SUB + i;
                load_row(B, Bs + t * N);
                Step step[PACK];
                at_lane.load(step, t);
                find_factors(factors[i], pole, step);
                follow(h, factors[i], B, step, RESET && cleared >> t & 1);
#pragma unroll
                for (int c = 0; c < PACK; ++c)
#pragma unroll
                    for (int s = 0; s < S; ++s) hs[i][c][s] = h[c][s];
            }
            __syncwarp();  // the gated gradients are there
            const State *B_at = Bs + j * SUB * N, *C_at = Cs + j * SUB * N;
            const Steps steps_at = at_lane.from(j * SUB);
            const Real* gy_at = shared.gy[me.warp] + me.lane / LANES * PACK;
            Real* const sums_to = shared.sums[me.warp] + me.lane / LANES * PACK;
            Real* const rows_to =
                shared.rows +
                (MATRICES ? (me.warp * ROW_STEPS + j % ROW_SLOTS * SUB) * ROW + me.first * WORDS : 0);
            // what a step takes is loaded a step ahead, before the stores that it must not pass
            Taken ahead;
            ahead.load(B_at, C_at, steps_at, gy_at, SUB - 1);
#pragma unroll
            for (int i = SUB - 1; i >= 0; --i) {
                const int t = j * SUB + i;
                const Taken taken = ahead;
                if (i) ahead.load(B_at, C_at, steps_at, gy_at, i - 1);
                Real sums[PACK * VALUES], row[REST ? S * REST : 1];
                back(pole, carry, B_VARIES ? taken.B : B, C_VARIES ? taken.C : C, hs[i],
                     i ? hs[i ? i - 1 : 0] : start, factors[i], taken.steps, taken.gy,
                     RESET && cleared >> t & 1, totals, sums, row);
                int to[PACK * VALUES];
#pragma unroll
                for (int v = 0; v < PACK * VALUES; ++v) to[v] = v % VALUES * PLANE + v / VALUES;
                sum_values<1, PACK * VALUES>(sums, to, me.lane,
                                             [&](int k, Real x) { sums_to[i * W + k] = x; });
                if constexpr (MATRICES > 0)
                    sum_rows<0, S, REST>(row, me.lane, 0, 0, true, [&](int s, int k, Real x) {
                        rows_to[i * ROW + s * WORDS + k] = x;
                    });
            }
            __syncwarp();
            Real g_tau = finish(shared, p, j, slot, mine, over, even, length - first - j * SUB,
                                row + first + j * SUB, at.channel);
            if (TIMED) {
#pragma unroll
                for (int mask = 1; mask < Q; mask *= 2)
                    g_tau = add(g_tau, __shfl_xor_sync(~0u, g_tau, mask));
                if (me.lane % Q == 0 && mine.works())
                    shared.dtau[me.warp * ROW_STEPS + j % ROW_SLOTS * SUB + mine.row] = g_tau;
            }
            __syncwarp();
            if (ROW_SLOTS < SUBS && j > 0) {
                __syncthreads();
                write_rows<SUB>(shared, p, at, first + j * SUB, length, row_at, j % ROW_SLOTS);
                if (ROW_SLOTS == 1) __syncthreads();
            }
        }
        const auto close = [&](int which, State(&x)[PACK][S]) {
#pragma unroll
            for (int i = 0; i < PACK * S; ++i) {
                State& total = shared.totals[which][i][threadIdx.x];
                total = add(total, x[i / S][i % S]);
                x[i / S][i % S] = Number::zero();
            }
        };
        close(0, totals.A);
        if (!B_VARIES) close(1, totals.B);
        if (!C_VARIES) close(1 + int(!B_VARIES), totals.C);
        const auto close_elements = [&](Real* total, Real(&x)[V]) {
            Real sum[V];
            load_elements(sum, static_cast<const Real*>(total));
#pragma unroll
            for (int v = 0; v < V; ++v) {
                sum[v] = add(sum[v], x[v]);
                x[v] = Real(0);
            }
            store_elements(total, sum);
        };
        close_elements(shared.over_time[0] + mine.slot, over.D);
        close_elements(shared.over_time[1] + mine.slot, over.bias);
        if (DECAY == 1) close_elements(shared.over_time[DECAY == 1 ? 2 : 0] + mine.slot, over.own);
    }

    const long long states = states_at(size, at.row, at, me);
    if (at.first == 0) store_states(p.dh0 + states_at(size, at.batch, at, me), carry, size, me);
    const auto total = [&](int which, State* to, long long pitch) {
#pragma unroll
        for (int i = 0; i < PACK * S; ++i) {
            if (i / S < me.channels && i % S < me.live)
                to[i / S * pitch + i % S] = shared.totals[which][i][threadIdx.x];
        }
    };
    total(0, p.dA + states, size.pitch);
    const long long constant =
        (at.row * size.width + at.channel + me.channel) * size.states + me.first;
    if (!B_VARIES) total(1, p.dB + constant, size.states);
    if (!C_VARIES) total(1 + int(!B_VARIES), p.dC + constant, size.states);
    const long long channel = at.row * size.width + at.channel + mine.channel;
#pragma unroll
    for (int which = 0; which < 2 + int(DECAY == 1); ++which)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            Real sum = shared.over_time[which][mine.slot + v];
#pragma unroll
            for (int mask = Q; mask < 32; mask *= 2)
                sum = add(sum, __shfl_xor_sync(~0u, sum, mask));
            Real* to = which == 0 ? p.dD : which == 1 ? p.dbias : p.down;
            if (to && mine.row == 0 && v < mine.live) to[channel + v] = sum;
        }
}
