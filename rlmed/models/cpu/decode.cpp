// Decode steps of a float32 decoder on a CPU; the interface is rlmed/models/cpu/compiled_decoder.py.
//
// A decode step computes one token per completion: so little that torch's operators take longer to
// call than to compute, and too few rows for the products that its libraries are made for. Here all
// layers are one parallel region, and the weights are read once, packed in the order in which the
// products need them: panels [inputs][PANEL] of PANEL outputs each.
//
// Every number of a row is a sum in a fixed order, whatever other rows are in the step.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;  // TILE rows times two vectors of outputs stay in registers
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 6;
#else
constexpr int LANES = 4, TILE = 6;
#endif
constexpr int PANEL = 2 * LANES;
constexpr int LINE = 32;         // tokens whose keys are transposed together; KEY_LINE of decode_kernels.py
constexpr int UNIT_ROWS = 8;     // completions of a group whose attention is one piece of work
constexpr int PROMPT_ROWS = 16;  // tokens of a prompt, likewise
constexpr int VALUE_BLOCK = 64;  // tokens whose values stay in the first cache while all queries read them
constexpr int DRAW_BLOCK = 128;  // tokens of the vocabulary with a sum of their own

typedef float V __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t I __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef double W __attribute__((vector_size(LANES * 8)));

inline V load(const float* from) { return *reinterpret_cast<const V*>(from); }
inline V fill(float value) { return V{} + value; }

inline void store(float* to, V value, int64_t count = LANES) {
    if (count >= LANES) {
        *reinterpret_cast<V*>(to) = value;
    } else if (count > 0) {
        std::memcpy(to, &value, count * sizeof(float));
    }
}

inline V load_first(const float* from, int64_t count, float rest) {
    if (count >= LANES) return load(from);
    V value = fill(rest);
    std::memcpy(&value, from, count * sizeof(float));
    return value;
}

template <int distance>
inline V folded(V value) {
    if constexpr (distance == 0) {
        return value;
    } else {
        I other;
        for (int lane = 0; lane < LANES; ++lane) other[lane] = lane ^ distance;
        return folded<distance / 2>(value + __builtin_shuffle(value, other));
    }
}

inline float sum(V value) { return folded<LANES / 2>(value)[0]; }

inline V larger(V a, V b) { return a > b ? a : b; }

inline float largest(V value) {
    float found = value[0];
    for (int lane = 1; lane < LANES; ++lane) found = std::max(found, value[lane]);
    return found;
}

// e^x to about 2 units in the last place, for -87 < x < 88; 0 for smaller x and for NaN.
inline V exponential(V x) {
    const V bounded = larger(x, fill(-87.0f));
    const V shift = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const V n = (bounded * fill(1.44269504f) + shift) - shift;
    const V r = (bounded - n * fill(0.693359375f)) - n * fill(-2.12194440e-4f);
    V p = fill(1.98412698e-4f);  // the series of e^r, |r| <= ln(2) / 2
    for (float factor : {1.38888889e-3f, 8.33333333e-3f, 4.16666667e-2f, 1.66666667e-1f, 0.5f, 1.0f, 1.0f})
        p = p * r + fill(factor);
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    const V result = p * reinterpret_cast<const V&>(power);
    return x > fill(-87.0f) ? result : V{};
}

inline V silu(V x) {
    const V bounded = -x < fill(80.0f) ? -x : fill(80.0f);
    return x / (fill(1.0f) + exponential(bounded));
}

// result[row] = sum over k of x[row][k] panel[k], for rows and a panel `stride` numbers apart.
template <int rows>
inline void tile(const float* x, int64_t x_stride, int64_t count, const float* panel, int64_t stride, V (*result)[2]) {
    V sums[rows][2] = {};
    for (int64_t k = 0; k < count; ++k) {
        const V low = load(panel + stride * k), high = load(panel + stride * k + LANES);
#pragma GCC unroll 8
        for (int row = 0; row < rows; ++row) {
            const float value = x[row * x_stride + k];
            sums[row][0] += low * value;
            sums[row][1] += high * value;
        }
    }
    std::memcpy(result, sums, sizeof(sums));
}

inline void tile(int64_t rows, const float* x, int64_t x_stride, int64_t count, const float* panel, int64_t stride,
                 V (*result)[2]) {
    switch (rows) {
        case 1: return tile<1>(x, x_stride, count, panel, stride, result);
        case 2: return tile<2>(x, x_stride, count, panel, stride, result);
        case 3: return tile<3>(x, x_stride, count, panel, stride, result);
        case 4: return tile<4>(x, x_stride, count, panel, stride, result);
        case 5: return tile<5>(x, x_stride, count, panel, stride, result);
        case 6: return tile<6>(x, x_stride, count, panel, stride, result);
        case 7: return tile<7>(x, x_stride, count, panel, stride, result);
        default: return tile<8>(x, x_stride, count, panel, stride, result);
    }
}

// Products of `rows` of x [rows][count] with the first columns of a matrix [count][stride]: calls
// put(row, column, vector, how many of its numbers count) for each vector of the result.
template <class Put>
void times_matrix(const float* x, int64_t rows, int64_t x_stride, int64_t count, const float* matrix, int64_t columns,
                  int64_t stride, std::vector<float>& copied, const Put& put) {
    for (int64_t column = 0; column < columns; column += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, columns - column);
        const float* panel = matrix + column;
        int64_t lines = stride;
        if (column + PANEL > stride) {  // beyond the last line may be the end of the memory
            copied.resize(count * PANEL);
            for (int64_t k = 0; k < count; ++k)
                std::memcpy(copied.data() + k * PANEL, panel + k * stride, width * sizeof(float));
            panel = copied.data();
            lines = PANEL;
        }
        for (int64_t row = 0; row < rows; row += TILE) {
            const int64_t some = std::min<int64_t>(TILE, rows - row);
            V found[8][2];
            tile(some, x + row * x_stride, x_stride, count, panel, lines, found);
            for (int64_t one = 0; one < some; ++one) {
                put(row + one, column, found[one][0], width);
                put(row + one, column + LANES, found[one][1], width - LANES);
            }
        }
    }
}

}  // namespace

extern "C" {

struct Product {
    const float* weight;  // [panels][inputs][PANEL]
    const float* bias;    // [panels][PANEL], or null
    int64_t panels, inputs, outputs;
};

struct Norm {
    const float* weight;
    float epsilon;
};

struct Layer {
    Norm input_norm, mlp_norm;
    Product heads;    // queries, keys and values, one after the other
    Product output;
    Product gate_up;  // each panel: LANES gates, then their LANES factors
    Product down;
    // keys [pages][kv_heads][page tokens / LINE][head width][LINE], values [pages][kv_heads][page tokens][head width]
    float *prefix_keys, *prefix_values;
    float *suffix_keys, *suffix_values;
};

struct Step {
    int64_t rows, groups, members, width, heads, kv_heads, head_width, layers;
    float scale;
    Norm norm;
    const Layer* layer;
    const int32_t *prefix_pages, *prefix_lengths, *member_rows, *suffix_pages, *counts;  // see StepPages
    int64_t prefix_columns, suffix_columns, prefix_tokens, suffix_tokens;  // of the tables; of a page
    const float *cosine, *sine;  // [rows][head width]
    float* states;               // [rows][width]: embeddings, then the layers' outputs
    float *normal, *projected, *attended, *gated;
};

int rlmed_lanes() { return LANES; }

// Pack a weight [outputs][inputs] into panels; what is beyond `outputs` is zero.
void rlmed_pack(const float* weight, int64_t outputs, int64_t inputs, float* packed, int threads) {
    const int64_t panels = (outputs + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel) {
        float* to = packed + panel * inputs * PANEL;
        const int64_t columns = std::min<int64_t>(PANEL, outputs - panel * PANEL);
        for (int64_t start = 0; start < inputs; start += LANES) {
            const int64_t end = std::min(inputs, start + LANES);
            for (int64_t column = 0; column < PANEL; ++column) {
                const float* from = weight + (panel * PANEL + column) * inputs;
                for (int64_t k = start; k < end; ++k) to[k * PANEL + column] = column < columns ? from[k] : 0.0f;
            }
        }
    }
}

}  // extern "C"

namespace {

// Within a parallel region: `put(row, first column, vector)` for each vector of x @ weight.T + bias.
template <class Put>
void multiply(const Product& product, const float* x, int64_t rows, const Put& put) {
    const int64_t blocks = (rows + TILE - 1) / TILE;
#pragma omp for collapse(2) schedule(static)
    for (int64_t panel = 0; panel < product.panels; ++panel) {
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t first = block * TILE, count = std::min<int64_t>(TILE, rows - first);
            V found[8][2];
            const float* weight = product.weight + panel * product.inputs * PANEL;
            tile(count, x + first * product.inputs, product.inputs, product.inputs, weight, PANEL, found);
            V bias[2] = {};
            if (product.bias != nullptr) {
                bias[0] = load(product.bias + panel * PANEL);
                bias[1] = load(product.bias + panel * PANEL + LANES);
            }
            for (int64_t row = 0; row < count; ++row)
                put(first + row, panel, found[row][0] + bias[0], found[row][1] + bias[1]);
        }
    }
}

void multiply_into(const Product& product, const float* x, int64_t rows, float* result) {
    multiply(product, x, rows, [&](int64_t row, int64_t panel, V low, V high) {
        const int64_t left = product.outputs - panel * PANEL;
        float* to = result + row * product.outputs + panel * PANEL;
        store(to, low, left);
        store(to + LANES, high, left - LANES);
    });
}

void multiply_add(const Product& product, const float* x, int64_t rows, float* result) {
    multiply(product, x, rows, [&](int64_t row, int64_t panel, V low, V high) {
        const int64_t left = product.outputs - panel * PANEL;
        float* to = result + row * product.outputs + panel * PANEL;
        if (left > 0) store(to, low + load_first(to, left, 0.0f), left);
        if (left > LANES) store(to + LANES, high + load_first(to + LANES, left - LANES, 0.0f), left - LANES);
    });
}

void multiply_gated(const Product& product, const float* x, int64_t rows, float* result) {
    multiply(product, x, rows, [&](int64_t row, int64_t panel, V gate, V factor) {
        const int64_t left = product.outputs - panel * LANES;
        store(result + row * product.outputs + panel * LANES, silu(gate) * factor, left);
    });
}

void normalise(const Norm& norm, const float* x, int64_t rows, int64_t width, float* result) {
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
        const float* from = x + row * width;
        V squares = {};
        for (int64_t k = 0; k < width; k += LANES) {
            const V value = load_first(from + k, width - k, 0.0f);
            squares += value * value;
        }
        const float factor = 1.0f / std::sqrt(sum(squares) / width + norm.epsilon);
        for (int64_t k = 0; k < width; k += LANES) {
            const int64_t left = width - k;
            const V value = load_first(from + k, left, 0.0f) * factor;
            store(result + row * width + k, value * load_first(norm.weight + k, left, 0.0f), left);
        }
    }
}

// Rotary embedding: x cos + rotate_half(x) sin, where rotate_half turns [a, b] into [-b, a].
void rotate(const float* x, const float* cosine, const float* sine, int64_t width, float scale, float* result) {
    const int64_t half = width / 2;
    for (int64_t k = 0; k < half; ++k) {
        result[k] = (x[k] * cosine[k] - x[half + k] * sine[k]) * scale;
        result[half + k] = (x[half + k] * cosine[half + k] + x[k] * sine[half + k]) * scale;
    }
}

// Replace scores by e^(score - largest); return their sum.
float exponentials(float* scores, int64_t count) {
    const float lowest = -std::numeric_limits<float>::infinity();
    V most = fill(lowest), sums = {};
    for (int64_t token = 0; token < count; token += LANES)
        most = larger(most, load_first(scores + token, count - token, lowest));
    const V shift = fill(largest(most));
    for (int64_t token = 0; token < count; token += LANES) {
        const V value = exponential(load_first(scores + token, count - token, lowest) - shift);
        store(scores + token, value, count - token);
        sums += value;
    }
    return sum(sums);
}

// Keys or values of one head in a sequence's pages.
struct Cached {
    const float* numbers;
    const int32_t* pages;
    int64_t tokens, page_tokens, heads, head, width;
};

// Call `use(start, tokens, index, place)` for each part of a sequence: `most` tokens at most, of one
// page, from its token `place` on; index = page * heads + head.
template <class Use>
void each_part(const Cached& cached, int64_t most, const Use& use) {
    for (int64_t start = 0; start < cached.tokens;) {
        const int64_t place = start % cached.page_tokens;
        const int64_t count = std::min({cached.tokens - start, cached.page_tokens - place, most});
        use(start, count, cached.pages[start / cached.page_tokens] * cached.heads + cached.head, place);
        start += count;
    }
}

struct Unit {
    int64_t group, first, count, head;
};

std::vector<Unit> prompt_units_of(const Step& step) {
    std::vector<Unit> units;
    for (int64_t group = 0; group < step.groups; ++group) {
        const int64_t length = step.prefix_lengths[group];
        for (int64_t first = 0; first < length; first += PROMPT_ROWS)
            for (int64_t head = 0; head < step.kv_heads; ++head)
                units.push_back({group, first, std::min<int64_t>(PROMPT_ROWS, length - first), head});
    }
    return units;
}

std::vector<Unit> units_of(const Step& step) {
    std::vector<Unit> units;
    for (int64_t group = 0; group < step.groups; ++group) {
        int64_t count = 0;
        const int32_t* rows = step.member_rows + group * step.members;
        while (count < step.members && rows[count] >= 0) ++count;
        for (int64_t first = 0; first < count; first += UNIT_ROWS)
            for (int64_t head = 0; head < step.kv_heads; ++head)
                units.push_back({group, first, std::min<int64_t>(UNIT_ROWS, count - first), head});
    }
    return units;
}

struct Scratch {
    std::vector<float> numbers, panel;
};

// scores[query][token] = queries[query] . keys[token].
void score(const float* queries, int64_t count, const Cached& keys, float* scores, int64_t stride, Scratch& scratch) {
    each_part(keys, LINE, [&](int64_t start, int64_t tokens, int64_t index, int64_t place) {
        const float* matrix = keys.numbers + (index * keys.page_tokens + place) * keys.width;
        times_matrix(queries, count, keys.width, keys.width, matrix, tokens, LINE, scratch.panel,
                     [&](int64_t query, int64_t token, V value, int64_t left) {
                         store(scores + query * stride + start + token, value, left);
                     });
    });
}

// result[query] += sum over tokens of weights[query][token] values[token].
void add_values(const float* weights, int64_t count, int64_t stride, const Cached& values, float* result,
                Scratch& scratch) {
    each_part(values, VALUE_BLOCK, [&](int64_t start, int64_t tokens, int64_t index, int64_t place) {
        const float* matrix = values.numbers + (index * values.page_tokens + place) * values.width;
        times_matrix(weights + start, count, stride, tokens, matrix, values.width, values.width, scratch.panel,
                     [&](int64_t query, int64_t column, V value, int64_t left) {
                         float* to = result + query * values.width + column;
                         if (left > 0) store(to, load_first(to, left, 0.0f) + value, left);
                     });
    });
}

// Write the key and value of a row's token to its place.
void append(const Step& step, int64_t row, int64_t head, const Cached& at, int64_t token, float* keys, float* values,
            float* turned) {
    const int64_t width = at.width, place = token % at.page_tokens;
    const int64_t page = (at.pages[token / at.page_tokens] * at.heads + head) * at.page_tokens;
    const float* own = step.projected + row * (step.heads + 2 * step.kv_heads) * width;
    rotate(own + (step.heads + head) * width, step.cosine + row * width, step.sine + row * width, width, 1.0f, turned);
    float* key = keys + (page + place / LINE * LINE) * width + place % LINE;
    for (int64_t k = 0; k < width; ++k) key[k * LINE] = turned[k];
    const float* value = own + (step.heads + step.kv_heads + head) * width;
    std::memcpy(values + (page + place) * width, value, width * sizeof(float));
}

// The queries of a row that share a head of keys, rotated and scaled.
void read_queries(const Step& step, int64_t row, int64_t head, float* queries) {
    const int64_t width = step.head_width, share = step.heads / step.kv_heads;
    const float* own = step.projected + (row * (step.heads + 2 * step.kv_heads) + head * share) * width;
    const float *cosine = step.cosine + row * width, *sine = step.sine + row * width;
    for (int64_t one = 0; one < share; ++one)
        rotate(own + one * width, cosine, sine, width, step.scale, queries + one * width);
}

// What a row attends to, from the weighted sums of its queries.
void write_attended(const Step& step, int64_t row, int64_t head, const float* result, const float* sums) {
    const int64_t width = step.head_width, share = step.heads / step.kv_heads;
    float* to = step.attended + (row * step.heads + head * share) * width;
    for (int64_t one = 0; one < share; ++one)
        for (int64_t k = 0; k < width; ++k) to[one * width + k] = result[one * width + k] / sums[one];
}

Cached prompt_of(const Step& step, int64_t group, int64_t head, const float* numbers, int64_t tokens) {
    const int32_t* pages = step.prefix_pages + group * step.prefix_columns;
    return {numbers, pages, tokens, step.prefix_tokens, step.kv_heads, head, step.head_width};
}

Cached completion_of(const Step& step, int64_t row, int64_t head, const float* numbers) {
    const int32_t* pages = step.suffix_pages + row * step.suffix_columns;
    return {numbers, pages, step.counts[row], step.suffix_tokens, step.kv_heads, head, step.head_width};
}

// Attend from each of some tokens of a prompt to itself and all before it; their keys and values are in
// its pages.
void attend_prompt(const Step& step, const Layer& layer, const Unit& unit, Scratch& scratch) {
    const int64_t width = step.head_width, share = step.heads / step.kv_heads, count = unit.count * share;
    const int64_t tokens = unit.first + unit.count, stride = (tokens + LANES - 1) / LANES * LANES;
    const int64_t row = step.member_rows[unit.group] + unit.first;
    scratch.numbers.resize(std::max<size_t>(scratch.numbers.size(), count * (2 * width + stride + 1)));
    float *queries = scratch.numbers.data(), *result = queries + count * width;
    float *sums = result + count * width, *scores = sums + count;
    std::memset(result, 0, count * width * sizeof(float));
    for (int64_t one = 0; one < unit.count; ++one)
        read_queries(step, row + one, unit.head, queries + one * share * width);
    score(queries, count, prompt_of(step, unit.group, unit.head, layer.prefix_keys, tokens), scores, stride, scratch);
    for (int64_t query = 0; query < count; ++query) {
        const int64_t seen = unit.first + query / share + 1;
        sums[query] = exponentials(scores + query * stride, seen);
        std::fill(scores + query * stride + seen, scores + query * stride + tokens, 0.0f);
    }
    const Cached values = prompt_of(step, unit.group, unit.head, layer.prefix_values, tokens);
    add_values(scores, count, stride, values, result, scratch);
    for (int64_t one = 0; one < unit.count; ++one)
        write_attended(step, row + one, unit.head, result + one * share * width, sums + one * share);
}

// Append a unit's keys and values to their pages, and attend to prompt and completions.
void attend(const Step& step, const Layer& layer, const Unit& unit, Scratch& scratch) {
    const int64_t width = step.head_width, share = step.heads / step.kv_heads, count = unit.count * share;
    const int32_t* rows = step.member_rows + unit.group * step.members + unit.first;
    const int64_t prompt = step.prefix_lengths[unit.group];
    int64_t longest = 0;
    for (int64_t member = 0; member < unit.count; ++member)
        longest = std::max<int64_t>(longest, step.counts[rows[member]]);
    const int64_t stride = (prompt + longest + LANES - 1) / LANES * LANES;
    scratch.numbers.resize(std::max<size_t>(scratch.numbers.size(), count * (2 * width + stride + 1)));
    float *queries = scratch.numbers.data(), *result = queries + count * width;
    float *sums = result + count * width, *scores = sums + count;
    std::memset(result, 0, count * width * sizeof(float));
    for (int64_t member = 0; member < unit.count; ++member) {
        const int64_t row = rows[member];
        const Cached own = completion_of(step, row, unit.head, nullptr);
        float* mine = queries + member * share * width;
        append(step, row, unit.head, own, own.tokens - 1, layer.suffix_keys, layer.suffix_values, mine);
        read_queries(step, row, unit.head, mine);
    }
    const Cached prompt_keys = prompt_of(step, unit.group, unit.head, layer.prefix_keys, prompt);
    score(queries, count, prompt_keys, scores, stride, scratch);
    for (int64_t member = 0; member < unit.count; ++member) {
        const int64_t row = rows[member], first = member * share;
        float* own = scores + first * stride;
        const Cached keys = completion_of(step, row, unit.head, layer.suffix_keys);
        const Cached values = completion_of(step, row, unit.head, layer.suffix_values);
        score(queries + first * width, share, keys, own + prompt, stride, scratch);
        for (int64_t one = 0; one < share; ++one)
            sums[first + one] = exponentials(own + one * stride, prompt + step.counts[row]);
        add_values(own + prompt, share, stride, values, result + first * width, scratch);
    }
    const Cached prompt_values = prompt_of(step, unit.group, unit.head, layer.prefix_values, prompt);
    add_values(scores, count, stride, prompt_values, result, scratch);
    for (int64_t member = 0; member < unit.count; ++member)
        write_attended(step, rows[member], unit.head, result + member * share * width, sums + member * share);
}

// The token whose part of the weights' cumulative sum holds `uniform`: first its block, then itself.
int64_t draw(const float* weights, int64_t count, const std::vector<double>& ends, double uniform) {
    const double threshold = uniform * ends.back();
    const int64_t block = std::upper_bound(ends.begin(), ends.end() - 1, threshold) - ends.begin();
    const double rest = threshold - (block > 0 ? ends[block - 1] : 0.0);
    const int64_t end = std::min(count, (block + 1) * DRAW_BLOCK);
    double before = 0.0;
    int64_t last = block * DRAW_BLOCK;  // a block's sum may round above its tokens' cumulative sum
    for (int64_t token = last; token < end; ++token) {
        if (weights[token] <= 0.0f) continue;
        last = token;
        before += weights[token];
        if (before > rest) break;
    }
    return last;
}

}  // namespace

extern "C" {

// Run all layers and the last norm, whose result is in `step->normal`: a token of each completion
// or, with `prompts`, all tokens of all prompts, whose first rows are in `member_rows` [groups].
void rlmed_decode(const Step* given, bool prompts, int threads) {
    const Step& step = *given;
    const std::vector<Unit> units = prompts ? prompt_units_of(step) : units_of(step);
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch;
        std::vector<float> turned(step.head_width);
        for (int64_t index = 0; index < step.layers; ++index) {
            const Layer& layer = step.layer[index];
            normalise(layer.input_norm, step.states, step.rows, step.width, step.normal);
            multiply_into(layer.heads, step.normal, step.rows, step.projected);
            if (prompts) {
#pragma omp for schedule(static)
                for (size_t index = 0; index < units.size(); ++index) {
                    const Unit& unit = units[index];
                    const Cached prompt = prompt_of(step, unit.group, unit.head, nullptr, 0);
                    for (int64_t token = unit.first; token < unit.first + unit.count; ++token)
                        append(step, step.member_rows[unit.group] + token, unit.head, prompt, token, layer.prefix_keys,
                               layer.prefix_values, turned.data());
                }
#pragma omp for schedule(dynamic)
                for (size_t unit = 0; unit < units.size(); ++unit) attend_prompt(step, layer, units[unit], scratch);
            } else {
#pragma omp for schedule(dynamic)
                for (size_t unit = 0; unit < units.size(); ++unit) attend(step, layer, units[unit], scratch);
            }
            multiply_add(layer.output, step.attended, step.rows, step.states);
            normalise(layer.mlp_norm, step.states, step.rows, step.width, step.normal);
            multiply_gated(layer.gate_up, step.normal, step.rows, step.gated);
            multiply_add(layer.down, step.gated, step.rows, step.states);
        }
        normalise(step.norm, step.states, step.rows, step.width, step.normal);
    }
}

void rlmed_multiply(const Product* product, const float* x, int64_t rows, float* result, int threads) {
#pragma omp parallel num_threads(threads)
    multiply_into(*product, x, rows, result);
}

// Sample a token per row of logits [rows][count]; see rollout/native/sampler.py.
void rlmed_sample(const float* logits, int64_t rows, int64_t count, const double* uniform, const float* temperature,
                  const bool* greedy, int64_t* tokens, float* logprobs, int threads) {
    const float lowest = -std::numeric_limits<float>::infinity();
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> weights(count);
        std::vector<double> ends((count + DRAW_BLOCK - 1) / DRAW_BLOCK);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; ++row) {
            const float* from = logits + row * count;
            const V divisor = fill(temperature[row]);
            V most = fill(lowest);
            I strange = {};
            for (int64_t token = 0; token < count; token += LANES) {
                const V found = load_first(from + token, count - token, lowest) / divisor;
                strange |= found != found;
                most = larger(most, found);
            }
            bool number = true;
            for (int lane = 0; lane < LANES; ++lane) number = number && !strange[lane];
            if (!number) {  // as torch's softmax has it; whoever reads the log-probability notices
                tokens[row] = std::find_if(from, from + count, [](float x) { return x != x; }) - from;
                logprobs[row] = std::numeric_limits<float>::quiet_NaN();
                continue;
            }
            const V shift = fill(largest(most));
            double mass = 0.0;
            for (int64_t start = 0, block = 0; start < count; start += DRAW_BLOCK, ++block) {
                const int64_t end = std::min(count, start + DRAW_BLOCK);
                W sums = {};
                for (int64_t token = start; token < end; token += LANES) {
                    const V weight = exponential(load_first(from + token, count - token, lowest) / divisor - shift);
                    store(weights.data() + token, weight, count - token);
                    sums += __builtin_convertvector(weight, W);
                }
                for (int lane = 0; lane < LANES; ++lane) mass += sums[lane];
                ends[block] = mass;
            }
            const int64_t token = greedy[row] ? std::max_element(from, from + count) - from
                                              : draw(weights.data(), count, ends, uniform[row]);
            tokens[row] = token;
            logprobs[row] = static_cast<float>(std::log(weights[token] / mass));
        }
    }
}

}  // extern "C"
