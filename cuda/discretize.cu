// SPDX-License-Identifier: MIT
// A_bar = decay(dt A) and B_bar = gain(dt, A) B element by element, and their gradients.
//
// Memory contract. The problem is (outer, n1, n2, M), any strides for A, dt, B and the gradients of the
// results; A and B, stored as real and imaginary numbers that lie wherever they do, are the same for all
// of outer. The results are compact, and each may be absent. Every number is read and written once; A and
// B once for EACH of outer. The S4D of 512 channels and 32 pairs moves 0.5 MB.
//
// Backward writes the gradients of A and B summed over EACH of outer, (ceil(outer / EACH), n1, n2, M), and
// that of dt, summed over M where dt does not depend on it: lanes first, far half to near, then the
// groups of 32 states one after the other by the lane that wrote the last sum. No sum depends on the grid.
//
// Launch. `lanes` neighbouring threads, a power of two up to 32, lie on the states of a row (n1, n2) for
// EACH of outer. A block has THREADS of them.
//
//     GBT        (1 + (1 - alpha) dt A) q, dt q, q = 1/(1 - alpha dt A)
//
// Compiled for DTYPE (float32 ... complex128), SCHEME (MAMBA, DIRAC, ZOH or GBT), EACH, THREADS.
#define SPLIT false
#define EXACT_ANGLES
#define GBT 5
#include "numbers.cuh"

using State = DTYPE;

template <class S>
struct RealOf {
    using type = S;
};
template <class R>
struct RealOf<Complex<R>> {
    using type = R;
};
using R = RealOf<State>::type;

#include "discretize.cuh"

struct Field {
    const R* data;  // null: absent
    long long outer, n1, n2, state;

    __device__ __forceinline__ const R* row(long long i1, long long i2) const {
        return data ? data + i1 * n1 + i2 * n2 : nullptr;
    }
};

struct Size {
    long long outer, n1, n2, states;
    long long lanes;
};

// ------------------------------------------------------------------------------ formulas

__device__ __forceinline__ void store(R* re, R* im, long long at, R x) { re[at] = x; }
__device__ __forceinline__ void store(R* re, R* im, long long at, Complex<R> x) {
    re[at] = x.re;
    im[at] = x.im;
}
template <class S>
struct Made;
template <>
struct Made<R> {
    static __device__ __forceinline__ R of(R re, R im) { return re; }
};
template <>
struct Made<Complex<R>> {
    static __device__ __forceinline__ Complex<R> of(R re, R im) { return {re, im}; }
};

__device__ __forceinline__ R reciprocal(R x) { return R(1) / x; }
__device__ __forceinline__ Complex<R> reciprocal(Complex<R> x) { return inverse(x); }

__device__ __forceinline__ R real_product(R x, R y) { return mul(x, y); }  // Re(conj(x) y)
__device__ __forceinline__ R real_product(Complex<R> x, Complex<R> y) {
    return fma(x.re, y.re, mul(x.im, y.im));
}

// One diagonal entry: its factors at a step, and their slopes.
struct Entry {
    State A;
    Pole<State> pole;
    R alpha;

    __device__ __forceinline__ Entry(State A, R alpha) : A(A), pole(A), alpha(alpha) {}

    __device__ __forceinline__ State q(R d) const {
        return reciprocal(scale_add(A, -mul(alpha, d), Constant<State>::one()));
    }

    __device__ __forceinline__ Factors<State> factors(R d) const {
        if constexpr (SCHEME == GBT) {
            const State p = q(d);
            return {fma(scale(A, mul(add(R(1), -alpha), d)), p, p), scale(p, d)};
        } else {
            Factors<State> f = pole.factors(d, d);
            if constexpr (SCHEME == MAMBA) f.gain = scale(Constant<State>::one(), d);
            return f;
        }
    }

    __device__ __forceinline__ Slopes<State> slopes(R d, const Factors<State>& f) const {
        if constexpr (SCHEME == GBT) {
            const State p = q(d), square = mul(p, p);
            return {square, square, scale(square, mul(alpha, mul(d, d)))};
        } else {
            Slopes<State> s = pole.slopes(d, d, f);
            if constexpr (SCHEME == MAMBA) s.gain_dt = Constant<State>::one();
            return s;
        }
    }
};

// ------------------------------------------------------------------------------ the place of a thread

struct Place {
    long long chunk, i1, i2, lane, outer;  // outer: the first of this thread's
    bool live;

    __device__ __forceinline__ explicit Place(const Size& n) {
        const long long groups = THREADS / n.lanes, rows = n.n1 * n.n2;
        const long long group = blockIdx.x * groups + threadIdx.x / n.lanes;
        lane = threadIdx.x % n.lanes;
        chunk = group / rows;
        i1 = group % rows / n.n2;
        i2 = group % n.n2;
        outer = chunk * EACH;
        live = outer < n.outer;
    }

    // Of the numbers (outer, n1, n2).
    __device__ __forceinline__ long long row(const Size& n, long long o) const {
        return (o * n.n1 + i1) * n.n2 + i2;
    }
};

#ifdef FORWARD
struct Arguments {
    Field A_re, A_im, dt, B_re, B_im;
    State *decay, *gain;
    double alpha;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern "C" __global__ void __launch_bounds__(THREADS)
    discretize(const __grid_constant__ Arguments p) {
    const Size& n = p.size;
    const Place at(n);
    if (!at.live) return;
    const R *A_re = p.A_re.row(at.i1, at.i2), *A_im = p.A_im.row(at.i1, at.i2);
    const R *B_re = p.B_re.row(at.i1, at.i2), *B_im = p.B_im.row(at.i1, at.i2);
    const R* dt = p.dt.row(at.i1, at.i2);
    for (long long m = at.lane; m < n.states; m += n.lanes) {
        const Entry entry(Made<State>::of(A_re[m * p.A_re.state],
                                          A_im ? A_im[m * p.A_im.state] : R(0)),
                          R(p.alpha));
        State B = Constant<State>::one();
        if (B_re) B = Made<State>::of(B_re[m * p.B_re.state], B_im ? B_im[m * p.B_im.state] : R(0));
        for (int k = 0; k < EACH && at.outer + k < n.outer; ++k) {
            const long long o = at.outer + k, to = at.row(n, o) * n.states + m;
            const Factors<State> f = entry.factors(dt[o * p.dt.outer + m * p.dt.state]);
            if (p.decay) p.decay[to] = f.decay;
            if (p.gain) p.gain[to] = B_re ? mul(f.gain, B) : f.gain;
        }
    }
}
#endif

#ifdef BACKWARD
struct Arguments {
    Field A_re, A_im, dt, B_re, B_im;
    Field decay, gain;  // cotangents; of complex numbers the imaginary part lies behind the real one
    R *dA_re, *dA_im, *dB_re, *dB_im, *ddt;
    double alpha;
    Size size;
    long long dA_apart, dB_apart;  // from a number to the next: 2 where parts lie side by side
    long long summed;              // dt does not depend on the state
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr bool COMPLEX = sizeof(State) > sizeof(R);

__device__ __forceinline__ State cotangent(const Field& f, const R* row, long long o, long long m) {
    if (!row) return Constant<State>::zero();
    const R* at = row + o * f.outer + m * f.state;
    return Made<State>::of(at[0], COMPLEX ? at[COMPLEX] : R(0));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    discretize_backward(const __grid_constant__ Arguments p) {
    const Size& n = p.size;
    const Place at(n);
    const R *A_re = p.A_re.row(at.i1, at.i2), *A_im = p.A_im.row(at.i1, at.i2);
    const R *B_re = p.B_re.row(at.i1, at.i2), *B_im = p.B_im.row(at.i1, at.i2);
    const R* dt = p.dt.row(at.i1, at.i2);
    const R *decay = p.decay.row(at.i1, at.i2), *gain = p.gain.row(at.i1, at.i2);
    for (long long first = 0; first < n.states; first += n.lanes) {
        const long long m = first + at.lane;
        const bool mine = at.live && m < n.states;
        const State A = !mine ? Constant<State>::zero()
                              : Made<State>::of(A_re[m * p.A_re.state],
                                                A_im ? A_im[m * p.A_im.state] : R(0));
        const Entry entry(A, R(p.alpha));
        State B = Constant<State>::one();
        if (B_re && mine)
            B = Made<State>::of(B_re[m * p.B_re.state], B_im ? B_im[m * p.B_im.state] : R(0));
        State dA = Constant<State>::zero(), dB = Constant<State>::zero();
        for (int k = 0; k < EACH; ++k) {
            const long long o = at.outer + k;
            if (EACH > 1 && k > 0 && k >= n.outer) break;  // the same for all threads
            const bool here = mine && o < n.outer;
            R step = R(0);
            if (here) {
                const R d = dt[o * p.dt.outer + m * p.dt.state];
                const Factors<State> f = entry.factors(d);
                const Slopes<State> s = entry.slopes(d, f);
                const State w = mul(conj(s.decay), cotangent(p.decay, decay, o, m));
                State g = cotangent(p.gain, gain, o, m);
                dA = scale_add(w, d, dA);
                step = real_product(A, w);
                if (B_re) {
                    dB = fma(conj(f.gain), g, dB);
                    g = mul(conj(B), g);
                }
                if constexpr (SCHEME != DIRAC) {
                    if constexpr (SCHEME != MAMBA) dA = fma(conj(s.gain_A), g, dA);
                    step = add(step, real_product(s.gain_dt, g));
                }
            }
            const long long row = at.row(n, o);
            if (p.summed) {
                for (int far = int(n.lanes) / 2; far > 0; far /= 2)
                    step = add(step, __shfl_xor_sync(~0u, step, far));
                if (at.lane == 0 && here) p.ddt[row] = first ? add(p.ddt[row], step) : step;
            } else if (here) {
                p.ddt[row * n.states + m] = step;
            }
        }
        if (mine) {
            const long long to = at.row(n, at.chunk) * n.states + m;
            store(p.dA_re, p.dA_im, to * p.dA_apart, dA);
            if (B_re) store(p.dB_re, p.dB_im, to * p.dB_apart, dB);
        }
    }
}
#endif
