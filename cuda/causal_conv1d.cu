// SPDX-License-Identifier: MIT
// The short causal convolution y_t = act(bias + sum_k w_k x_{t-K+1+k}), K = TAPS, and its gradients.
//
// Memory contract. Sequences are (groups, rows, L, C), channels next to each other, other strides
// any; x, grad_y and (SECOND) what is added to grad_y are read, y (contiguous) and dx are written and
// overlap nothing that is read. weight (groups, C, K) and bias (groups, C) belong to a group;
// groups > 1 is a vmap over parameters. tail, the K - 1 samples before x, and grad_last are (groups,
// rows, K - 1, C), steps contiguous; the new tail and dtail are contiguous. reset (groups, rows, L) is
// bool with any strides. Null: no bias, zeros before x, no reset, no dtail wanted. Forward reads x and
// writes y: 2 arrays. Backward reads x and grad_y and writes dx: 3 arrays (SECOND: 4), plus K + 1 sums
// a channel and block; it recomputes the pre-activation. 8 x 4096 x 2048 float32: 537 and 805 MB.
//
// Backward with INNER what is added to grad_y is a product that goes to no memory, g2 (groups, rows, L,
// inner) times factor (groups, inner, C): thin_product.cuh. A warp makes the steps that it walks itself,
// 16 at a time, and g2 is read once for 128 channels: 16 times 6 MB, from the L2, for 8 x 4096 x 96 and
// 2048 channels in bfloat16.
//
// Work. A thread owns PACK neighbouring channels and walks a segment of time with the last K - 1
// samples in registers; samples at the ends of segments are read twice or, backward, three times, by
// neighbours in time (from the L2 as a rule). Backward walks forward too: the step that sees x_p last
// is p + K - 1, and until then dx_p waits in registers. A reset empties the window, so that a sample
// hidden by it, be it infinite, meets no arithmetic.
//
// Launch. blockDim = columns * (rows of a block), column = PACK channels, row = a segment; forward the
// grid is column_blocks * ceil(items / rows of a block), items = all segments. Backward blocks stay
// in one group, take `span` rounds of segments, add what their rows have by a tree and leave it in
// partial (groups, tiles, K + 1, C); causal_conv1d_sum adds the tiles, in the order that their number
// fixes. No float atomics; a row's y, tail, dx and dtail depend on its own numbers only, in
// operations that no launch shape changes.
//
// An access of PACK numbers needs C, strides and addresses to be multiples of it; weights are read 16
// bytes at a time if `wide`. Segments have at least K - 1 steps, but for a row's last. Items are less
// than 2^31. With AHEAD the inputs of UNROLL steps are loaded while those before are computed. With INNER
// (sm_80 and above, 16 bits, UNROLL a divisor of 16) blocks have 32 columns of PACK = 4, so that a row is a
// warp, and segments are multiples of 16 steps, but for a row's last; a lane beyond the last channel does
// and writes what that of the last ones does.
//
// Compiled for DTYPE, WEIGHT (that of weight and bias: DTYPE or its State), TAPS, SILU, PACK, THREADS,
// BLOCKS, UNROLL and one of FORWARD, BACKWARD (AHEAD, SECOND, INNER and with it KEPT, of what a product is
// stored as until it is added), SUM (WARPS, and DTYPE the State).
#include "elementary.cuh"
#include "memory.cuh"
#include "numbers.cuh"
#include "thin_product.cuh"

using T = DTYPE;
using State = typename StateOf<T>::type;
using Weight = WEIGHT;

#ifndef SUM
using Items = Pack<T, PACK>;

constexpr int BEFORE = TAPS - 1;
constexpr int PLACES = BEFORE > 0 ? BEFORE : 1;  // there are no arrays of size 0

struct Sequence {
    const T* data;
    long long group, row, time;
};

struct Tail {
    const T* data;
    long long group, row;
};

struct Parameter {
    const Weight* data;
    long long group;
};

struct Bits {
    const unsigned char* data;
    long long group, row, time;
};

struct Size {
    long long length, channels, rows;  // rows of a group
    long long segment, segments;       // steps of one, and how many a row has
    long long columns, column_blocks, items, tiles, span;
    long long wide;
};

// One segment: its row, its steps [first, end), its channels.
struct Place {
    long long group, row, batch, first, end, channel;
};

__device__ __forceinline__ Place locate(unsigned item, unsigned group, long long channel,
                                        const Size& size) {
    Place at;
    const unsigned row = item / unsigned(size.segments);
    at.group = group;
    at.row = row;
    at.batch = group * size.rows + row;
    at.first = (long long)(item - row * unsigned(size.segments)) * size.segment;
    at.end = at.first + size.segment < size.length ? at.first + size.segment : size.length;
    at.channel = channel;
    return at;
}

__device__ __forceinline__ const T* row_of(const Sequence& x, const Place& at) {
    return x.data + at.group * x.group + at.row * x.row + at.channel;
}

__device__ __forceinline__ const T* row_of(const Tail& x, const Place& at) {
    return x.data + at.group * x.group + at.row * x.row + at.channel;
}

__device__ __forceinline__ const unsigned char* row_of(const Bits& x, const Place& at) {
    return x.data + at.group * x.group + at.row * x.row;
}

__device__ __forceinline__ void widen(const Items& x, State (&to)[PACK]) {
#pragma unroll
    for (int v = 0; v < PACK; ++v) to[v] = widen(x.item[v]);
}

__device__ __forceinline__ Items zeros() {
    Items x;
#pragma unroll
    for (int v = 0; v < PACK; ++v) x.item[v] = narrow<T>(State(0));
    return x;
}

// sigmoid(y). What is rounded to 16 bits needs no exponential that is right to the last of 24.
template <class R>
__device__ __forceinline__ R gate_of(R y) {
    if constexpr (sizeof(T) == 2)
        return inverse(add(R(1), power(mul(y, -LOG2E<R>))));
    else
        return sigmoid(y);
}

// ------------------------------------------------------------------------------ taps and window

struct Taps {
    State weight[TAPS][PACK], bias[PACK];

    __device__ __forceinline__ void load(const Parameter& w, const Parameter& b, long long group,
                                         long long channel, bool wide) {
        constexpr int NUMBERS = PACK * TAPS, EACH = 16 / int(sizeof(Weight));
        const Weight* from = w.data + group * w.group + channel * TAPS;
        Weight raw[NUMBERS];
        if (NUMBERS % EACH == 0 && wide) {
#pragma unroll
            for (int i = 0; i < NUMBERS / EACH; ++i) {
                const auto pack = Pack<Weight, EACH>::load(from + i * EACH);
#pragma unroll
                for (int j = 0; j < EACH; ++j) raw[i * EACH + j] = pack.item[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < NUMBERS; ++i) raw[i] = from[i];
        }
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            bias[v] = b.data ? State(widen(b.data[group * b.group + channel + v])) : State(0);
#pragma unroll
            for (int k = 0; k < TAPS; ++k) weight[k][v] = widen(raw[v * TAPS + k]);
        }
    }
};

// The K - 1 samples before the current one, oldest first.
struct Window {
    State sample[PLACES][PACK];
    int age;  // steps since the last reset, counted only where there are resets

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PLACES; ++i)
#pragma unroll
            for (int v = 0; v < PACK; ++v) sample[i][v] = 0;
    }

    // Before step `first`: from the row, the tail, or zeros.
    template <bool RESET>
    __device__ __forceinline__ void fill(const Sequence& x, const Tail& tail, const Bits& reset,
                                         const Place& at, const Size& size) {
        Items items[PLACES];
        bool cut[PLACES];
#pragma unroll
        for (int i = 0; i < BEFORE; ++i) {
            const long long t = at.first - BEFORE + i;
            cut[i] = false;
            if (t >= 0) {
                items[i] = Items::load(row_of(x, at) + t * x.time);
                if (RESET) cut[i] = row_of(reset, at)[t * reset.time];
            } else if (tail.data) {
                items[i] = Items::load(row_of(tail, at) + (t + BEFORE) * size.channels);
            } else {
                items[i] = zeros();
            }
        }
        clear();
        age = TAPS;
#pragma unroll
        for (int i = 0; i < BEFORE; ++i) {
            if (RESET) turn(cut[i]);
            State x[PACK];
            widen(items[i], x);
            push(x);
        }
    }

    __device__ __forceinline__ void turn(bool cut) {
        ++age;
        if (cut) {
            clear();
            age = 0;
        }
    }

    __device__ __forceinline__ void push(const State (&x)[PACK]) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
#pragma unroll
            for (int i = 0; i + 1 < BEFORE; ++i) sample[i][v] = sample[i + 1][v];
            sample[PLACES - 1][v] = x[v];
        }
    }

    __device__ __forceinline__ State convolve(const Taps& taps, const State (&x)[PACK],
                                              int v) const {
        State sum = taps.bias[v];
#pragma unroll
        for (int i = 0; i < BEFORE; ++i) sum = fma(taps.weight[i][v], sample[i][v], sum);
        return fma(taps.weight[BEFORE][v], x[v], sum);
    }
};

// A thread's column, and its row of the block.
struct Seat {
    unsigned row, column, across, block;
    long long channel;
};

__device__ __forceinline__ Seat take_seat(const Size& size) {
    Seat seat;
    const unsigned columns = unsigned(size.columns), blocks = unsigned(size.column_blocks);
    seat.row = threadIdx.x / columns;
    seat.column = threadIdx.x - seat.row * columns;
    seat.block = blockIdx.x / blocks;
    seat.across = blockIdx.x - seat.block * blocks;
    seat.channel = (long long)(seat.across * columns + seat.column) * PACK;
    return seat;
}
#endif

#ifdef FORWARD
struct Arguments {
    Sequence x;
    Tail tail;
    Parameter weight, bias;
    Bits reset;
    T *y, *last;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

__device__ __forceinline__ Items step(Window& window, const Taps& taps, const Items& items) {
    State x[PACK], sum[PACK];
    widen(items, x);
#pragma unroll
    for (int v = 0; v < PACK; ++v) sum[v] = window.convolve(taps, x, v);
    window.push(x);
    if (SILU) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) sum[v] = mul(sum[v], gate_of(sum[v]));
    }
    Items y;
#pragma unroll
    for (int v = 0; v < PACK; ++v) y.item[v] = narrow<T>(sum[v]);
    return y;
}

template <bool RESET>
__device__ __forceinline__ void walk(const Arguments& p, const Taps& taps, const Place& at) {
    const Size& size = p.size;
    Window window;
    window.fill<RESET>(p.x, p.tail, p.reset, at, size);
    const T* x = row_of(p.x, at) + at.first * p.x.time;
    const unsigned char* reset = RESET ? row_of(p.reset, at) + at.first * p.reset.time : nullptr;
    T* y = p.y + (at.batch * size.length + at.first) * size.channels + at.channel;
    long long t = at.first;
#pragma unroll 1
    for (; t + UNROLL <= at.end; t += UNROLL) {
        Items items[UNROLL];
        bool cut[UNROLL];
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            items[j] = Items::load(x);
            x += p.x.time;
            if (RESET) {
                cut[j] = *reset;
                reset += p.reset.time;
            }
        }
#pragma unroll
        for (int j = 0; j < UNROLL; ++j) {
            if (RESET) window.turn(cut[j]);
            step(window, taps, items[j]).store(y);
            y += size.channels;
        }
    }
#pragma unroll 1
    for (; t < at.end; ++t) {
        if (RESET) {
            window.turn(*reset);
            reset += p.reset.time;
        }
        step(window, taps, Items::load(x)).store(y);
        x += p.x.time;
        y += size.channels;
    }
    if (at.end == size.length) {
        T* last = p.last + at.batch * BEFORE * size.channels + at.channel;
#pragma unroll
        for (int i = 0; i < BEFORE; ++i) {
            Items sample;
#pragma unroll
            for (int v = 0; v < PACK; ++v) sample.item[v] = narrow<T>(window.sample[i][v]);
            sample.store(last + i * size.channels);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    causal_conv1d(const __grid_constant__ Arguments p) {
    const Size& size = p.size;
    const Seat seat = take_seat(size);
    const unsigned item = seat.block * (blockDim.x / unsigned(size.columns)) + seat.row;
    if (seat.channel >= size.channels || item >= size.items) return;
    const unsigned per_group = unsigned(size.rows * size.segments), group = item / per_group;
    const Place at = locate(item - group * per_group, group, seat.channel, size);
    Taps taps;
    taps.load(p.weight, p.bias, group, seat.channel, size.wide);
    if (p.reset.data)
        walk<true>(p, taps, at);
    else
        walk<false>(p, taps, at);
}
#endif

#ifdef BACKWARD
#if __CUDA_ARCH__ >= 1000  // where the compiler needs more registers for the same steps
constexpr int TOGETHER = (UNROLL + 1) / 2;
#else
constexpr int TOGETHER = UNROLL;
#endif

struct Target {
    T* data;
    long long group, row, time;
};

struct Factor {
    const T* data;
    long long group, row, inner;
};

struct Arguments {
    Sequence g, g2, x;
    Factor factor;
    Tail g_last, tail;
    Parameter weight, bias;
    Bits reset;
    Target dx;
    T* dtail;
    State* partial;
    Size size;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

struct Sums {
    State weight[TAPS][PACK], bias[PACK];
};

// dx_p of the last K - 1 steps, as far as it is known, the oldest first.
struct Pending {
    State sum[PLACES][PACK];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < PLACES; ++i)
#pragma unroll
            for (int v = 0; v < PACK; ++v) sum[i][v] = 0;
    }

    // Send g of the current step to the samples that it saw; the oldest of them is done: return it.
    template <bool RESET>
    __device__ __forceinline__ void send(State (&done)[PACK], const State (&g)[PACK],
                                         const Taps& taps, int age) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            if (BEFORE == 0) {
                done[v] = mul(taps.weight[0][v], g[v]);
                continue;
            }
#pragma unroll
            for (int i = 0; i < BEFORE; ++i) {
                const State seen = RESET && BEFORE - i > age ? State(0) : g[v];
                const State total = fma(taps.weight[i][v], seen, sum[i][v]);
                if (i == 0)
                    done[v] = total;
                else
                    sum[i - 1][v] = total;
            }
            sum[PLACES - 1][v] = mul(taps.weight[BEFORE][v], g[v]);
        }
    }

    __device__ __forceinline__ void send_nothing(State (&done)[PACK]) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            done[v] = sum[0][v];
#pragma unroll
            for (int i = 0; i + 1 < BEFORE; ++i) sum[i][v] = sum[i + 1][v];
            sum[PLACES - 1][v] = 0;
        }
    }
};

// Where dx goes: to dx, to dtail if the sample lies before x, nowhere if it is a neighbour's.
struct Output {
    T *dx, *dtail;
    long long time, channels;
    int left;  // samples before the segment's first

    __device__ __forceinline__ Output(const Arguments& p, const Place& at) {
        channels = p.size.channels;
        time = p.dx.time;
        left = BEFORE;
        dx = p.dx.data + at.group * p.dx.group + at.row * p.dx.row + at.first * time + at.channel;
        dtail = at.first == 0 ? p.dtail : nullptr;
        if (dtail) dtail += at.batch * BEFORE * channels + at.channel;
    }

    // INSIDE: the sample is known to be one of the segment.
    template <bool INSIDE>
    __device__ __forceinline__ void next(const State (&done)[PACK]) {
        Items out;
#pragma unroll
        for (int v = 0; v < PACK; ++v) out.item[v] = narrow<T>(done[v]);
        if (INSIDE || left == 0) {
            out.store(dx);
            dx += time;
            return;
        }
        --left;
        if (dtail) {
            out.store(dtail);
            dtail += channels;
        }
    }
};

// What a step reads: x, the gradient of y, and where SECOND what is added to that.
struct Read {
    Items x, grad, more;
    bool cut;
};

template <bool RESET>
struct Reader {
    const T *x, *grad, *more;
    const unsigned char* reset;
    const Arguments& p;

    __device__ __forceinline__ Reader(const Arguments& arguments, const Place& at)
        : x(row_of(arguments.x, at) + at.first * arguments.x.time),
          grad(row_of(arguments.g, at) + at.first * arguments.g.time),
          more(row_of(arguments.g2, at) + at.first * arguments.g2.time),
          reset(row_of(arguments.reset, at) + at.first * arguments.reset.time), p(arguments) {}

    // The next steps, `count` of them.
    template <int STEPS>
    __device__ __forceinline__ void read(Read (&to)[STEPS], int count = STEPS) {
#pragma unroll
        for (int j = 0; j < STEPS; ++j) {
            if (RESET) to[j].cut = false;
            if (j >= count) continue;
            to[j].x = Items::load(x);
            to[j].grad = Items::load(grad);
            x += p.x.time;
            grad += p.g.time;
            if (SECOND) {
                to[j].more = Items::load(more);
                more += p.g2.time;
            }
            if (RESET) {
                to[j].cut = *reset;
                reset += p.reset.time;
            }
        }
    }
};

// What is added to the gradient of y beside SECOND: with INNER a product.
#if INNER
extern __shared__ uint4 arena[];

struct Addend {
    using Product = ThinProduct<T, KEPT, INNER>;
    static_assert(PACK == 4 && Product::STEPS % TOGETHER == 0, "not as tiles are read");

    const Product product;
    const T* from;
    long long time;
    int channel, steps;

    // By all threads of a block; `channel` is the thread's own.
    __device__ __forceinline__ Addend(const Arguments& p, const Seat& seat, unsigned group,
                                      long long channel)
        : product(arena, int(seat.row), int(seat.column), int(p.factor.inner)),
          channel(int(channel - (long long)seat.across * Product::CHANNELS)) {
        const T* const w = p.factor.data + group * p.factor.group + channel;
        product.load_weight(w, p.factor.row, int(seat.row), int(blockDim.x / 32));
        __syncthreads();  // the factor is there
    }

    // At a segment, of which, with those after it that it sees, so many steps are wanted.
    __device__ __forceinline__ void begin(const Arguments& p, const Place& at, int wanted) {
        time = p.g2.time;
        from = p.g2.data + at.group * p.g2.group + at.row * p.g2.row + at.first * time;
        steps = wanted;
        product.fetch(from, time, steps);
    }

    // Before step t of the segment and those up to the next call; t grows.
    __device__ __forceinline__ void prepare(int t) {
        if (unsigned(t) % Product::STEPS || t >= steps) return;
        product.compute();
        const int next = t + Product::STEPS;
        if (next < steps) product.fetch(from + next * time, time, steps - next);
    }

    __device__ __forceinline__ void add_to(State (&g)[PACK], int t) const {
        const auto more = product.read(int(unsigned(t) % Product::STEPS), channel);
#pragma unroll
        for (int v = 0; v < PACK; ++v) g[v] = add(g[v], widen(more.item[v]));
    }
};
#else
struct Addend {
    __device__ __forceinline__ Addend(const Arguments&, const Seat&, unsigned, long long) {}
    __device__ __forceinline__ void begin(const Arguments&, const Place&, int) {}
    __device__ __forceinline__ void prepare(int) {}
    __device__ __forceinline__ void add_to(State (&)[PACK], int) const {}
};
#endif

// Step t of the walk; with COUNT it adds to the sums of the parameters.
template <bool RESET, bool COUNT, bool INSIDE>
__device__ __forceinline__ void step(const Read& read, const Addend& addend, int t,
                                     const Taps& taps, Window& window, Pending& pending,
                                     Sums& sums, Output& output) {
    if (RESET) window.turn(read.cut);
    State x[PACK], g[PACK], done[PACK];
    widen(read.x, x);
    widen(read.grad, g);
    if (SECOND) {
        State more[PACK];
        widen(read.more, more);
#pragma unroll
        for (int v = 0; v < PACK; ++v) g[v] = add(g[v], more[v]);
    }
    addend.add_to(g, t);
    if (SILU) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
            const State y = window.convolve(taps, x, v), gate = gate_of(y);
            g[v] = mul(g[v], mul(gate, fma(y, add(State(1), -gate), State(1))));
        }
    }
    if (COUNT) {
#pragma unroll
        for (int v = 0; v < PACK; ++v) {
#pragma unroll
            for (int i = 0; i < BEFORE; ++i)
                sums.weight[i][v] = fma(g[v], window.sample[i][v], sums.weight[i][v]);
            sums.weight[BEFORE][v] = fma(g[v], x[v], sums.weight[BEFORE][v]);
            sums.bias[v] = add(sums.bias[v], g[v]);
        }
    }
    window.push(x);
    pending.send<RESET>(done, g, taps, window.age);
    output.next<INSIDE>(done);
}

template <bool RESET>
__device__ __forceinline__ void walk(const Arguments& p, const Taps& taps, const Place& at,
                                     Addend& addend, Sums& sums) {
    const Size& size = p.size;
    Window window;
    Pending pending;
    Output output(p, at);
    Reader<RESET> reader(p, at);
    const int steps = int(at.end - at.first);
    // The K - 1 steps after the segment see its samples.
    const long long remaining = size.length - at.end;
    const int seen = remaining < BEFORE ? int(remaining) : BEFORE;
    addend.begin(p, at, steps + seen);
    Read reads[TOGETHER];
    if (AHEAD && steps >= TOGETHER) reader.read(reads);
    window.fill<RESET>(p.x, p.tail, p.reset, at, size);
    pending.clear();
    int t = 0;
#pragma unroll 1
    for (; t + TOGETHER <= steps; t += TOGETHER) {
        if (!AHEAD) reader.read(reads);
        Read now[TOGETHER];
#pragma unroll
        for (int j = 0; j < TOGETHER; ++j) now[j] = reads[j];
        if (AHEAD && t + 2 * TOGETHER <= steps) reader.read(reads);
        addend.prepare(t);
        if (t >= BEFORE) {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j)
                step<RESET, true, true>(now[j], addend, t + j, taps, window, pending, sums, output);
        } else {
#pragma unroll
            for (int j = 0; j < TOGETHER; ++j)
                step<RESET, true, false>(now[j], addend, t + j, taps, window, pending, sums, output);
        }
    }
    addend.prepare(t);  // a segment of no multiple of 16 steps is the last: nothing is seen after it
#pragma unroll 1
    for (; t < steps; ++t) {
        Read one[1];
        reader.read(one);
        step<RESET, true, false>(one[0], addend, t, taps, window, pending, sums, output);
    }
    Read after[PLACES];  // and after the last step, the new tail
    reader.read(after, seen);
    const T* last = row_of(p.g_last, at);
#pragma unroll
    for (int i = 0; i < BEFORE; ++i) {
        if (i < seen) {
            step<RESET, false, false>(after[i], addend, t + i, taps, window, pending, sums, output);
            continue;
        }
        const int entry = i - int(remaining);
        const Items g = Items::load(last + entry * size.channels);
        State done[PACK];
        pending.send_nothing(done);
        if (!RESET || BEFORE - 1 - entry <= window.age) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) done[v] = add(done[v], State(widen(g.item[v])));
        }
        output.next<false>(done);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    causal_conv1d_backward(const __grid_constant__ Arguments p) {
    __shared__ State shared[PACK][THREADS];
    const Size& size = p.size;
    const Seat seat = take_seat(size);
    const unsigned rows = blockDim.x / unsigned(size.columns);
    const unsigned group = seat.block / unsigned(size.tiles);
    const unsigned tile = seat.block - group * unsigned(size.tiles);
    const bool live = seat.channel < size.channels;
    const long long channel = live ? seat.channel : size.channels - PACK;
    Sums sums = {};
    Addend addend(p, seat, group, channel);
    if (live || INNER) {
        Taps taps;
        taps.load(p.weight, p.bias, group, channel, size.wide);
        const long long round = tile * size.span, items = size.items;
#pragma unroll 1
        for (long long i = round; i < round + size.span; ++i) {
            const long long item = i * rows + seat.row;
            if (item >= items) break;
            const Place at = locate(unsigned(item), group, channel, size);
            if (p.reset.data)
                walk<true>(p, taps, at, addend, sums);
            else
                walk<false>(p, taps, at, addend, sums);
        }
    }
    State* partial =
        p.partial + (long long)seat.block * (TAPS + 1) * size.channels + seat.channel;
#pragma unroll
    for (int k = 0; k <= TAPS; ++k) {
        State total[PACK];
#pragma unroll
        for (int v = 0; v < PACK; ++v)
            shared[v][threadIdx.x] = total[v] = k < TAPS ? sums.weight[k][v] : sums.bias[v];
        for (unsigned n = rows; n > 1;) {
            const unsigned half = (n + 1) / 2;
            __syncthreads();
            if (seat.row + half < n) {
#pragma unroll
                for (int v = 0; v < PACK; ++v) {
                    total[v] = add(total[v], shared[v][threadIdx.x + half * unsigned(size.columns)]);
                    shared[v][threadIdx.x] = total[v];
                }
            }
            n = half;
        }
        __syncthreads();
        if (live && seat.row == 0) {
#pragma unroll
            for (int v = 0; v < PACK; ++v) partial[k * size.channels + v] = total[v];
        }
    }
}
#endif

#ifdef SUM
// dweight (groups, C, K) and dbias (groups, C) from partial (groups, tiles, K + 1, C). A block of 32 *
// WARPS threads adds 32 numbers: warp w takes the tiles w, w + WARPS, ...
struct Arguments {
    const State* partial;
    Weight *dweight, *dbias;
    long long tiles, channels, blocks;  // blocks of a group
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES, "the launcher packs another layout");

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    causal_conv1d_sum(const __grid_constant__ Arguments p) {
    __shared__ State sums[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const unsigned group = blockIdx.x / unsigned(p.blocks);
    const long long numbers = (TAPS + 1) * p.channels;
    const long long number = (blockIdx.x - group * unsigned(p.blocks)) * 32LL + lane;
    State total = 0;
    if (number < numbers) {
        const State* partial = p.partial + group * p.tiles * numbers + number;
#pragma unroll 8
        for (long long tile = warp; tile < p.tiles; tile += WARPS)
            total = add(total, partial[tile * numbers]);
    }
    sums[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && number < numbers) {
        for (int w = 1; w < WARPS; ++w) total = add(total, sums[w][lane]);
        const int k = int(number / p.channels);
        const long long channel = group * p.channels + (number - k * p.channels);
        if (k < TAPS)
            p.dweight[channel * TAPS + k] = narrow<Weight>(total);
        else if (p.dbias)
            p.dbias[channel] = narrow<Weight>(total);
    }
}
#endif
