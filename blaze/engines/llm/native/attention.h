// Keys and values of a step are kept, then its queries attend to all that their sequences have.

#pragma once

#include "kv_layout.h"

#include <vector>

extern "C" {

// Shared with Python: keep in step with native/kernels.py.
struct BlazeStep {
  int64_t rows;
  int64_t threads;
  int64_t longest;         // keys of the row that has the most
  const int64_t *start;    // [rows], of the row's slot, in tokens
  const int64_t *capacity; // [rows], of the row's slot
  const int64_t *position; // [rows], of the row's token in its sequence
  const int64_t *id;       // [rows], of the row's token; read by step.cpp alone
};

struct BlazeHeads {
  int64_t queries;
  int64_t keys; // heads of keys and values
  int64_t dim;
  int64_t window; // keys that a query sees, itself counted; 0: all
  float scale;
  float eps;           // of the norms
  const float *cos;    // [positions][dim]
  const float *sin;    // [positions][dim]
  const float *q_norm; // [dim] or null
  const float *k_norm;
};

} // extern "C"

namespace {

constexpr int kQueries = 6;      // that share a pass over keys and values
constexpr int64_t kTogether = 2; // neighbouring rows of a sequence, whose queries share passes

// One head's query or key: norm (if the model has one), then rotary position, as the models do it.
template <typename T>
void rotated(const T *x, const float *norm, const BlazeHeads &heads, int64_t position, float *out) {
  const int64_t dim = heads.dim, half = dim / 2;
  const float *cosine = heads.cos + position * dim, *sine = heads.sin + position * dim;
  float plain[kMaxDim];
  for (int64_t d = 0; d < dim; d++) plain[d] = to_float(x[d]);
  if (norm) {
    Floats squares = {};
    for (int64_t d = 0; d < dim; d += 16) squares += load16(plain + d) * load16(plain + d);
    const float factor = 1.0f / __builtin_sqrtf(total(squares) / float(dim) + heads.eps);
    for (int64_t d = 0; d < dim; d++) plain[d] *= factor * norm[d];
  }
  for (int64_t d = 0; d < half; d++) {
    out[d] = plain[d] * cosine[d] - plain[d + half] * sine[d];
    out[d + half] = plain[d + half] * cosine[d + half] + plain[d] * sine[d + half];
  }
}

template <typename T> struct Query {
  T numbers[kMaxDim];
  int64_t first;    // token that it sees
  int64_t position; // the last one
  T *out;
};

// Weights of the tokens from exp(score - top), in place: as numbers of T, from the row's beginning on. Gives
// the sum of what is stored. Writing never overtakes reading.
template <typename T> float weigh_scores(float *scores, Floats most, int64_t from, int64_t blocks) {
  float top = most[0];
  for (int l = 1; l < 16; l++) top = most[l] > top ? most[l] : top;
  T *weights = (T *)scores;
  Floats sum = {};
  for (int64_t b = from; b < blocks; b++) {
    store16(weights + b * kBlock, exp16(load16(scores + b * kBlock) - top));
    sum += load16(weights + b * kBlock);
  }
  return total(sum);
}

// `Q` queries of a sequence and a head of keys. What they see may differ at the edges. `next`: keys that
// will be read after these, or null.
template <typename T, int Q>
void attend_together(const T *keys, const T *values, const T *next, const BlazeHeads &heads, const Query<T> *query,
                     float *scratch, int64_t stride) {
  const int64_t dim = heads.dim;
  int64_t begin = query[0].first, end = query[0].position + 1; // what anybody sees
  int64_t from_all = begin, to_all = end;                       // what all see
  const T *numbers[Q];
  for (int i = 0; i < Q; i++) {
    const int64_t to = query[i].position + 1;
    begin = query[i].first < begin ? query[i].first : begin;
    from_all = query[i].first > from_all ? query[i].first : from_all;
    end = to > end ? to : end;
    to_all = to < to_all ? to : to_all;
    numbers[i] = query[i].numbers;
  }
  Floats most[Q];
  for (int i = 0; i < Q; i++) most[i] = splat(-__builtin_inff());
  const Floats lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  auto take = [&](int64_t block, int i, Floats score) {
    const int64_t at = block * kBlock;
    score *= heads.scale;
    if (at + kBlock > query[i].position + 1) // what lies behind the row's own token is not its to see
      score = lane <= splat(float(query[i].position - at)) ? score : splat(-__builtin_inff());
    if (at < query[i].first) score = lane >= splat(float(query[i].first - at)) ? score : splat(-__builtin_inff());
    most[i] = score > most[i] ? score : most[i];
    std::memcpy(scratch + i * stride + at, &score, 64);
  };
  const int64_t from = begin / kBlock, blocks = (end + kBlock - 1) / kBlock;
  int64_t block = from;
  for (; block + 2 <= blocks; block += 2) {
    fetch(values + block * kBlock * dim, 2 * kBlock * dim * sizeof(T));
    Floats two[Q][2];
    scores<Q, 2>(numbers, keys + block * kBlock * dim, dim, two);
    for (int i = 0; i < Q; i++) take(block, i, two[i][0]), take(block + 1, i, two[i][1]);
  }
  for (; block < blocks; block++) {
    Floats one[Q][1];
    scores<Q, 1>(numbers, keys + block * kBlock * dim, dim, one);
    for (int i = 0; i < Q; i++) take(block, i, one[i][0]);
  }
  float share[Q];
  const T *weights[Q];
  for (int i = 0; i < Q; i++) {
    share[i] = 1.0f / weigh_scores<T>(scratch + i * stride, most[i], from, blocks);
    weights[i] = (const T *)(scratch + i * stride);
  }
  // A query adds up in the order of tokens: those before what all see, those, and those after. Whole pairs.
  from_all = (from_all + 1) / 2 * 2;
  to_all = to_all / 2 * 2;
  if (to_all < from_all) to_all = from_all;
  for (int64_t d = 0; d < dim; d += 64) {
    const int vectors = dim - d >= 64 ? 4 : int((dim - d) / 16);
    const T *some = values + d * kStride(T{});
    Floats sum[Q][4] = {};
    for (int i = 0; i < Q; i++) {
      const int64_t to = query[i].position + 1 < from_all ? query[i].position + 1 : from_all;
      if (query[i].first < to) weigh<1>(vectors, some, dim, weights + i, query[i].first, to, (const T *)nullptr, sum + i);
    }
    if (from_all < to_all) weigh<Q>(vectors, some, dim, weights, from_all, to_all, d ? nullptr : next, sum);
    for (int i = 0; i < Q; i++) {
      const int64_t since = query[i].first > to_all ? query[i].first : to_all, to = query[i].position + 1;
      if (since < to) weigh<1>(vectors, some, dim, weights + i, since, to, (const T *)nullptr, sum + i);
    }
    for (int i = 0; i < Q; i++)
      for (int c = 0; c < vectors; c++) store16(query[i].out + d + c * 16, sum[i][c] * share[i]);
  }
}

// Where the keys and values of a row's sequence begin, for one head.
inline int64_t slot_of(const BlazeStep &step, const BlazeHeads &heads, int64_t row, int64_t head) {
  return (step.start[row] * heads.keys + head * step.capacity[row]) * heads.dim;
}

// Keep the keys and values of a row.
template <typename T>
void keep(const BlazeStep &step, const BlazeHeads &heads, int64_t row, const T *qkv, T *keys, T *values) {
  const int64_t dim = heads.dim, position = step.position[row];
  for (int64_t head = 0; head < heads.keys; head++) {
    const int64_t slot = slot_of(step, heads, row, head);
    const T *from = qkv + (row * (heads.queries + 2 * heads.keys) + heads.queries + head) * dim;
    float key[kMaxDim];
    rotated(from, heads.k_norm, heads, position, key);
    write_key(keys + slot + position / kBlock * kBlock * dim, position % kBlock, key, dim);
    write_value(values + slot, position, from + heads.keys * dim, dim);
  }
}

inline int64_t scores_stride(const BlazeStep &step) { return (step.longest + 2 * kBlock) / kBlock * kBlock; }
inline int64_t scores_size(const BlazeStep &step) { return kQueries * scores_stride(step); } // of a thread's scratch

// The rows of a step, by neighbours of a sequence: where each group begins, and where the last one ends.
inline std::vector<int64_t> groups_of(const BlazeStep &step) {
  std::vector<int64_t> begins;
  for (int64_t row = 0; row < step.rows; row++) {
    const bool follows = row && step.start[row] == step.start[row - 1] && step.position[row] == step.position[row - 1] + 1;
    if (!follows || row - begins.back() == kTogether) begins.push_back(row);
  }
  begins.push_back(step.rows);
  return begins;
}

// Item `item` of (groups * heads of keys); `next` is the item after it. `out`: where the item's own queries
// of its first row go; `width` from one row to the next.
template <typename T>
void attend(const BlazeStep &step, const std::vector<int64_t> &groups, const BlazeHeads &heads, int64_t item,
            int64_t next, const T *qkv, const T *keys, const T *values, float *scratch, T *out, int64_t width) {
  const int64_t first = groups[item / heads.keys], last = groups[item / heads.keys + 1], head = item % heads.keys;
  const int64_t dim = heads.dim, group = heads.queries / heads.keys, count = (last - first) * group;
  const int64_t slot = slot_of(step, heads, first, head), stride = scores_stride(step);
  const bool more = next / heads.keys + 1 < int64_t(groups.size());
  const T *ahead = more ? keys + slot_of(step, heads, groups[next / heads.keys], next % heads.keys) : nullptr;
  if (ahead == keys + slot) ahead = nullptr; // at hand
  for (int64_t done = 0; done < count;) {
    const int64_t some = count - done < kQueries ? count - done : kQueries;
    Query<T> queries[kQueries];
    for (int64_t i = 0; i < some; i++) {
      const int64_t row = first + (done + i) / group, query_of = (done + i) % group, at = head * group + query_of;
      const int64_t position = step.position[row];
      float query[kMaxDim];
      rotated(qkv + (row * (heads.queries + 2 * heads.keys) + at) * dim, heads.q_norm, heads, position, query);
      for (int64_t d = 0; d < dim; d += 16) store16(queries[i].numbers + d, load16(query + d));
      queries[i].first = heads.window && position >= heads.window ? position - heads.window + 1 : 0;
      queries[i].position = position;
      queries[i].out = out + (row - first) * width + query_of * dim;
    }
    const T *k = keys + slot, *v = values + slot;
    switch (some) {
    case 1: attend_together<T, 1>(k, v, ahead, heads, queries, scratch, stride); break;
    case 2: attend_together<T, 2>(k, v, ahead, heads, queries, scratch, stride); break;
    case 3: attend_together<T, 3>(k, v, ahead, heads, queries, scratch, stride); break;
    case 4: attend_together<T, 4>(k, v, ahead, heads, queries, scratch, stride); break;
    case 5: attend_together<T, 5>(k, v, ahead, heads, queries, scratch, stride); break;
    default: attend_together<T, kQueries>(k, v, ahead, heads, queries, scratch, stride);
    }
    done += some;
    ahead = nullptr; // once is enough
  }
}

} // namespace
