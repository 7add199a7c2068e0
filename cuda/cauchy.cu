// SPDX-License-Identifier: MIT
// r_k = sum_n 2 (i x_k beta_n - c_k alpha_n) / D_kn with D_kn = c_k^2 square_n - x_k^2 -
// 2 i x_k c_k rho_n, x_k = a sin(pi k / L), c_k = cos(pi k / L), k = 0 ... L / 2; and its gradients.
// One reciprocal a pair (k, n), for all rows that share the nodes; no pair is ever in memory.
//
// Memory contract. alpha, beta (P, R, H, N); square, rho (P, H, N); a (P, H); out and grad
// (P, R, H, K, 2), K = L / 2 + 1; all Real and contiguous. The forward reads n's numbers once a tile
// of THREADS * EACH frequencies and writes out once. The backward reads grad once for every
// LANES * EACH states, and writes the sums of every TILE frequencies to `partial` (P, H, groups,
// tiles, FIELDS, N), which cauchy_sums adds up. H 1024, N 64, L 16384, one row, float32: 67 MB written
// by the forward; 67 MB read by the backward and 12 MB of partial sums.
//
// Launch. Rows go in groups of ROWS (the last is filled up with zeros). Forward: one block a group and
// tile. Backward: THREADS threads are `lanes` (a power of two up to 32) times slices of the frequencies,
// one block a group, tile and chunk of lanes * EACH states. Sums: one block for each (p, h). The order of
// operations depends on N and L alone.
#include "elementary.cuh"
#include "memory.cuh"

using Real = DTYPE;
constexpr int V = 16 / int(sizeof(Real));
using Items = Pack<Real, V>;
using Pair = Pack<Real, 2>;

// `count` numbers as accesses of V of them, at the start of a line of shared memory.
template <int count>
struct Line {
    static constexpr int packs = (count + V - 1) / V, pitch = packs * V;
    Items items[packs];

    __device__ __forceinline__ explicit Line(const Real* from) {
#pragma unroll
        for (int i = 0; i < packs; ++i) items[i] = Items::load(from + i * V);
    }
    __device__ __forceinline__ Real operator[](int i) const { return items[i / V].item[i % V]; }
};

// sin(pi x), |x| <= 1/2: the series, right to 4e-12, which float32 cannot tell from exact.
__device__ __forceinline__ float sine(double x, float) {
    const double y = mul(mul(x, x), 9.869604401089358);
    double s = -7.647163731819816e-13;
    s = fma(s, y, 1.605904383682161e-10);
    s = fma(s, y, -2.505210838544172e-08);
    s = fma(s, y, 2.755731922398589e-06);
    s = fma(s, y, -0.0001984126984126984);
    s = fma(s, y, 0.008333333333333333);
    s = fma(s, y, -0.16666666666666666);
    s = fma(s, y, 1.0);
    return float(mul(mul(x, 3.141592653589793), s));
}
__device__ __forceinline__ double sine(double x, double) { return sinpi(x); }

// A frequency: x = a s and c, and the products that D is made of.
struct Node {
    Real x, c, x2, c2, xc2;

    __device__ __forceinline__ Node(Real a, long long k, long long length, double half) {
        x = mul(a, sine(mul(double(2 * k), half), Real(0)));
        c = sine(mul(double(length - 2 * k), half), Real(0));
        x2 = mul(x, x);
        c2 = mul(c, c);
        xc2 = mul(Real(2), mul(x, c));
    }
};

// u + i w = 1 / D
__device__ __forceinline__ void reciprocal(Real x2, Real c2, Real xc2, Real square, Real rho, Real& u,
                                           Real& w) {
    u = fma(c2, square, -x2);
    w = mul(xc2, rho);
    const Real over = inverse(fma(u, u, mul(w, w)));
    u = mul(u, over);
    w = mul(w, over);
}

#if defined(FORWARD) || defined(BACKWARD)
// What a block works on: group of rows, and the place of its first row and nodes.
struct Place {
    long long head, first, row, nodes;  // head: (p, h); first: row r of the group; row: (p, r, h)
    int rows;

    __device__ __forceinline__ Place(long long group, long long head, long long rows, long long heads)
        : head(head), first(group * ROWS), rows(int(min((long long)ROWS, rows - group * ROWS))) {
        const long long p = head / heads;
        row = (p * rows + first) * heads + (head - p * heads);
    }
};
#endif

// ------------------------------------------------------------------------------ forward

#ifdef FORWARD
struct Arguments {
    const Real *alpha, *beta, *square, *rho, *a;
    Real* out;
    long long rows, heads, states, length, groups, tiles;
    double half;  // 1 / (2 length)
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

constexpr int CHUNK = 64;  // states whose numbers are there at a time
using Numbers = Line<2 + 2 * ROWS>;

extern "C" __global__ void __launch_bounds__(THREADS) cauchy(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ Real numbers[CHUNK][Numbers::pitch];
    const long long tile = blockIdx.x % p.tiles, where = blockIdx.x / p.tiles;
    const Place at(where % p.groups, where / p.groups, p.rows, p.heads);
    const long long count = p.length / 2 + 1, k0 = tile * (THREADS * EACH) + threadIdx.x;
    const Real a = p.a[at.head];
    Real x2[EACH], c2[EACH], xc2[EACH], sums[EACH][ROWS][4];
#pragma unroll
    for (int q = 0; q < EACH; ++q) {
        const Node node(a, min(k0 + q * THREADS, count - 1), p.length, p.half);
        x2[q] = node.x2;
        c2[q] = node.c2;
        xc2[q] = node.xc2;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[q][r][i] = 0;
    }
#pragma unroll 1
    for (long long first = 0; first < p.states; first += CHUNK) {
        const int here = int(min((long long)CHUNK, p.states - first));
        __syncthreads();  // the numbers have been read
        for (int i = threadIdx.x; i < here; i += THREADS) {
            const long long node = at.head * p.states + first + i;
            numbers[i][0] = p.square[node];
            numbers[i][1] = p.rho[node];
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const long long from = (at.row + r * p.heads) * p.states + first + i;
                numbers[i][2 + 2 * r] = r < at.rows ? p.alpha[from] : Real(0);
                numbers[i][3 + 2 * r] = r < at.rows ? p.beta[from] : Real(0);
            }
        }
        __syncthreads();  // the numbers are there
        if (k0 >= count) continue;
#pragma unroll 2
        for (int n = 0; n < here; ++n) {
            const Numbers of(numbers[n]);
#pragma unroll
            for (int q = 0; q < EACH; ++q) {
                Real u, w;
                reciprocal(x2[q], c2[q], xc2[q], of[0], of[1], u, w);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    Real(&sum)[4] = sums[q][r];
                    sum[0] = fma(of[2 + 2 * r], u, sum[0]);
                    sum[1] = fma(of[3 + 2 * r], u, sum[1]);
                    sum[2] = fma(of[2 + 2 * r], w, sum[2]);
                    sum[3] = fma(of[3 + 2 * r], w, sum[3]);
                }
            }
        }
    }
#pragma unroll
    for (int q = 0; q < EACH; ++q) {
        const long long k = k0 + q * THREADS;
        if (k >= count) break;
        const Node node(a, k, p.length, p.half);
        const Real x = mul(Real(2), node.x), c = mul(Real(2), node.c);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Real(&sum)[4] = sums[q][r];
            Pair y;
            y.item[0] = -fma(x, sum[3], mul(c, sum[0]));
            y.item[1] = fma(x, sum[1], -mul(c, sum[2]));
            if (r < at.rows) y.store(p.out + ((at.row + r * p.heads) * count + k) * 2);
        }
    }
}
#endif

// ------------------------------------------------------------------------------ backward

constexpr int FIELDS = 2 * ROWS + 3;  // of partial: of alpha and beta in turn, then square, rho, x

#ifdef BACKWARD
struct Arguments {
    const Real *grad, *alpha, *beta, *square, *rho, *a;
    Real* partial;
    long long rows, heads, states, length, groups, tiles, chunks, lanes;
    double half;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// With G the upstream and Y = sum over rows of conj(G) 2 (i x beta - c alpha), Z = Y / D^2:
// dalpha = Re(-2 c conj(G) / D), dbeta = Re(2 i x conj(G) / D), dsquare = -c^2 Re Z, drho = -2 x c Im Z
// and, of a, x^2 Re Z. Those of alpha and beta are A u - B w, A + i B what 1 / D = u + i w multiplies.
using Frequency = Line<3 + 4 * ROWS>;  // c^2, x^2, 2 x c; A, B of alpha and of beta for each row

extern "C" __global__ void __launch_bounds__(THREADS)
    cauchy_backward(const __grid_constant__ Arguments p) {
    alignas(16) __shared__ Real frequencies[THREADS][Frequency::pitch];
    __shared__ Real rest[THREADS * EACH];
    const long long chunk = blockIdx.x % p.chunks, tile = blockIdx.x / p.chunks % p.tiles;
    const long long where = blockIdx.x / (p.chunks * p.tiles);
    const Place at(where % p.groups, where / p.groups, p.rows, p.heads);
    const long long count = p.length / 2 + 1;
    const int lanes = int(p.lanes), slices = THREADS / lanes;
    const int lane = threadIdx.x % lanes, slice = threadIdx.x / lanes;
    const long long first = chunk * lanes * EACH;
    const Real a = p.a[at.head];
    Real square[EACH], rho[EACH], alpha[EACH][ROWS], beta[EACH][ROWS], sums[EACH][FIELDS];
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const long long n = min(first + e * lanes + lane, p.states - 1);
        square[e] = p.square[at.head * p.states + n];
        rho[e] = p.rho[at.head * p.states + n];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const long long from = (at.row + r * p.heads) * p.states + n;
            alpha[e][r] = r < at.rows ? p.alpha[from] : Real(0);
            beta[e][r] = r < at.rows ? p.beta[from] : Real(0);
        }
#pragma unroll
        for (int f = 0; f < FIELDS; ++f) sums[e][f] = 0;
    }
    const long long end = min((tile + 1) * TILE, count);
#pragma unroll 1
    for (long long k0 = tile * TILE; k0 < end; k0 += THREADS) {
        const int here = int(min((long long)THREADS, end - k0));
        __syncthreads();  // the frequencies have been read
        if (threadIdx.x < here) {
            const long long k = k0 + threadIdx.x;
            const Node node(a, k, p.length, p.half);
            Real* line = frequencies[threadIdx.x];
            line[0] = node.c2;
            line[1] = node.x2;
            line[2] = node.xc2;
            const Real x = mul(Real(2), node.x), c = mul(Real(2), node.c);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                Pair g;
                g.item[0] = g.item[1] = 0;
                if (r < at.rows) g = Pair::load(p.grad + ((at.row + r * p.heads) * count + k) * 2);
                line[3 + 4 * r] = -mul(c, g.item[0]);
                line[4 + 4 * r] = mul(c, g.item[1]);
                line[5 + 4 * r] = mul(x, g.item[1]);
                line[6 + 4 * r] = mul(x, g.item[0]);
            }
        }
        __syncthreads();  // the frequencies are there
#pragma unroll 1
        for (int k = slice; k < here; k += slices) {
            const Frequency of(frequencies[k]);
#pragma unroll
            for (int e = 0; e < EACH; ++e) {
                Real u, w, re = 0, im = 0;
                reciprocal(of[1], of[0], of[2], square[e], rho[e], u, w);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const Real A = of[3 + 4 * r], B = of[4 + 4 * r];
                    const Real C = of[5 + 4 * r], D = of[6 + 4 * r];
                    Real &dalpha = sums[e][2 * r], &dbeta = sums[e][2 * r + 1];
                    dalpha = fma(A, u, fma(-B, w, dalpha));
                    dbeta = fma(C, u, fma(-D, w, dbeta));
                    re = r ? fma(alpha[e][r], A, re) : mul(alpha[e][r], A);
                    im = r ? fma(alpha[e][r], B, im) : mul(alpha[e][r], B);
                    re = fma(beta[e][r], C, re);
                    im = fma(beta[e][r], D, im);
                }
                const Real once = fma(re, u, -mul(im, w)), other = fma(re, w, mul(im, u));
                const Real z_re = fma(once, u, -mul(other, w)), z_im = fma(once, w, mul(other, u));
                Real* last = sums[e] + 2 * ROWS;
                last[0] = fma(of[0], z_re, last[0]);
                last[1] = fma(of[2], z_im, last[1]);
                last[2] = fma(of[1], z_re, last[2]);
            }
        }
    }
    Real* partial = p.partial + (where * p.tiles + tile) * FIELDS * p.states;
#pragma unroll
    for (int f = 0; f < FIELDS; ++f) {
        __syncthreads();  // the field before has been added up
#pragma unroll
        for (int e = 0; e < EACH; ++e) rest[(slice * EACH + e) * lanes + lane] = sums[e][f];
        __syncthreads();  // every slice's sums are there
        for (int i = threadIdx.x; i < lanes * EACH && first + i < p.states; i += THREADS) {
            Real total = rest[i];
            for (int s = 1; s < slices; ++s) total = add(total, rest[s * lanes * EACH + i]);
            partial[f * p.states + first + i] = total;
        }
    }
}
#endif

#ifdef SUMS
struct Arguments {
    const Real *partial, *beta, *rho, *a;
    Real *dalpha, *dbeta, *dsquare, *drho, *da;
    long long rows, heads, states, groups, tiles;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

// a da = sum_n beta dbeta + rho drho + 2 x^2 Re Z.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    cauchy_sums(const __grid_constant__ Arguments p) {
    __shared__ Real totals[THREADS];
    const long long head = blockIdx.x, batch = head / p.heads, pitch = FIELDS * p.states;
    const Real* partial = p.partial + head * p.groups * p.tiles * pitch;
    const auto sum = [&](const Real* from, long long tiles) {
        Real total = 0;
#pragma unroll 4
        for (long long i = 0; i < tiles; ++i) total = add(total, from[i * pitch]);
        return total;
    };
    Real own = 0;
    for (long long n = threadIdx.x; n < p.states; n += THREADS) {
        for (long long r = 0; r < p.rows; ++r) {
            const long long group = r / ROWS, field = 2 * (r - group * ROWS);
            const long long to = ((batch * p.rows + r) * p.heads + (head - batch * p.heads)) * p.states + n;
            const Real* from = partial + group * p.tiles * pitch + field * p.states + n;
            p.dalpha[to] = sum(from, p.tiles);
            const Real dbeta = sum(from + p.states, p.tiles);
            p.dbeta[to] = dbeta;
            own = fma(p.beta[to], dbeta, own);
        }
        const Real* from = partial + 2 * ROWS * p.states + n;
        const long long to = head * p.states + n, all = p.groups * p.tiles;
        const Real drho = -sum(from + p.states, all);
        p.dsquare[to] = -sum(from, all);
        p.drho[to] = drho;
        own = fma(p.rho[to], drho, own);
        own = fma(Real(2), sum(from + 2 * p.states, all), own);
    }
    totals[threadIdx.x] = own;
    for (int half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) totals[threadIdx.x] = add(totals[threadIdx.x], totals[threadIdx.x + half]);
    }
    if (threadIdx.x == 0) p.da[head] = totals[0] / p.a[head];
}
#endif
