// A whole step of a Llama-family model in bf16, for CPUs with a bf16 dot product: one call, one team of
// threads, and only the hidden state between layers is in fp32.
//
// As in kernels.cpp a row has the same bits whatever shares its step.

#include "attention.h"
#include "matrix.h"
#include "rows.h"

#ifdef BF16_DOT

#include "team.h"

#include <algorithm>
#include <exception>
#include <memory>
#include <omp.h>
#include <sched.h>

extern "C" {

// Shared with Python: keep in step with native/kernels.py.
struct BlazeLayer {
  BlazeHeads heads;
  const float *input_norm; // [hidden]
  const float *mlp_norm;
  BlazeMatrix qkv;
  BlazeMatrix output;
  BlazeMatrix gate_up; // 16 outputs of gate, 16 of up, and so on
  BlazeMatrix down;
  void *keys; // of all slots
  void *values;
};

struct BlazeModel {
  int64_t hidden;
  int64_t layers;
  float eps;
  const BlazeLayer *layer;
  const float *final_norm;
  BlazeMatrix head;
  const void *embedding; // [vocabulary][hidden], or null: the head's rows are the embeddings
  const int64_t *cores;  // one for each thread, or null: wherever they like
};

// What comes of a step: for each of `count` rows the logits, and the first of the largest.
struct BlazeResult {
  int64_t count;
  const int64_t *rows; // of the step
  void *logits;        // [count][vocabulary]
  float *largest;      // [count]; not a number where a logit is none
  int64_t *likeliest;  // [count]
};

struct BlazeBuffers { // [rows] of each, unless they are of the results
  float *hidden;      // [hidden]
  void *normed;       // [hidden]
  void *qkv;
  void *attended;
  void *gated;        // [inner]
  float *last_hidden; // of each result
  void *last_qkv;
};

} // extern "C"

namespace {

constexpr int64_t kParts = 64; // of the rows, where the work on one is small
constexpr int64_t kRowsOfItem = 96; // of a long prompt: enough to be worth reading a block of weights for

// Memory of one thread. Not initialised: for a large model that alone would take milliseconds.
struct Scratch {
  std::unique_ptr<float[]> scores;
  std::unique_ptr<BFloat[]> unpacked;
  std::unique_ptr<float[]> sums;      // of an item of a product
  std::unique_ptr<BFloat[]> attended; // of an item of attention
};

// Multiply all rows of x; `take(row, output, sums)` gets 64 sums at a time, from output `output` on.
template <typename Take>
void multiply_all(Team::Member &team, Scratch &scratch, const BlazeMatrix &matrix, const BFloat *x, int64_t rows,
                  const Take &take) {
  const int64_t parts = (rows + kRowsOfItem - 1) / kRowsOfItem;
  const auto first = [&](int64_t part) { return rows * part / parts; };
  float *kept = scratch.sums.get();
  team.each(
      blocks_of(matrix.outputs) * parts,
      [&](int64_t item, int64_t next) {
        const int64_t block = item / parts, part = item % parts;
        const int64_t ahead = next / parts == block ? -1 : next / parts;
        multiply(matrix, block, ahead, x + first(part) * matrix.inputs, first(part + 1) - first(part),
                 scratch.unpacked.get(),
                 [&](int64_t row, const Floats *sums) { std::memcpy(kept + row * kOutputs, sums, kOutputs * 4); });
      },
      [&](int64_t item) {
        const int64_t part = item % parts;
        for (int64_t row = first(part); row < first(part + 1); row++) {
          Floats sums[kPanels];
          std::memcpy(sums, kept + (row - first(part)) * kOutputs, sizeof(sums));
          take(row, item / parts * kOutputs, sums);
        }
      });
}

void store_all(Team::Member &team, Scratch &scratch, const BlazeMatrix &matrix, const BFloat *x, int64_t rows, BFloat *out) {
  multiply_all(team, scratch, matrix, x, rows, [&](int64_t row, int64_t output, const Floats *sums) {
    for (int p = 0; p < kPanels; p++, output += kPanel)
      store_some(out + row * matrix.outputs + output, sums[p], matrix.outputs - output);
  });
}

void add_all(Team::Member &team, Scratch &scratch, const BlazeMatrix &matrix, const BFloat *x, int64_t rows, float *hidden) {
  multiply_all(team, scratch, matrix, x, rows, [&](int64_t row, int64_t output, const Floats *sums) {
    float *to = hidden + row * matrix.outputs;
    for (int p = 0; p < kPanels; p++, output += kPanel)
      if (output + kPanel <= matrix.outputs)
        store16(to + output, load16(to + output) + sums[p]);
      else
        for (int64_t i = 0; output + i < matrix.outputs; i++) to[output + i] += sums[p][i];
  });
}

void gate_all(Team::Member &team, Scratch &scratch, const BlazeMatrix &matrix, const BFloat *x, int64_t rows, int64_t inner, BFloat *out) {
  multiply_all(team, scratch, matrix, x, rows, [&](int64_t row, int64_t output, const Floats *sums) {
    int64_t at = output / 2;
    for (int p = 0; p < kPanels; p += 2, at += kPanel)
      store_some(out + row * inner + at, silu_mul(sums[p], sums[p + 1]), inner - at);
  });
}

// A row of a matrix in bf16, as it was before it was packed.
inline void unpack_row(const BlazeMatrix &matrix, int64_t row, float *out) {
  const BFloat *from = (const BFloat *)matrix.weights + row / kOutputs * kOutputs * matrix.inputs +
                       row % kOutputs * 2; // panels of a block lie side by side
  for (int64_t k = 0; k < matrix.inputs; k++) out[k] = to_float(from[k / 2 * 2 * kOutputs + k % 2]);
}

void embed(const BlazeModel &model, int64_t id, float *out) {
  if (!model.embedding) return unpack_row(model.head, id, out);
  const BFloat *from = (const BFloat *)model.embedding + id * model.hidden;
  for (int64_t k = 0; k < model.hidden; k++) out[k] = to_float(from[k]);
}

void find_largest(const BFloat *logits, int64_t count, float *largest, int64_t *likeliest) {
  Floats most = splat(-__builtin_inff());
  Ints bad = {};
  int64_t i = 0;
  for (; i + kPanel <= count; i += kPanel) {
    const Floats some = load16(logits + i);
    most = some > most ? some : most;
    bad |= some != some;
  }
  float top = -__builtin_inff();
  for (int l = 0; l < kPanel; l++) {
    if (bad[l]) top = __builtin_nanf("");
    if (most[l] > top) top = most[l];
  }
  for (; i < count; i++) {
    const float one = to_float(logits[i]);
    if (one != one || one > top) top = one;
  }
  *largest = top;
  i = 0;
  while (i + kPanel <= count && !_mm512_cmpeq_ps_mask((__m512)load16(logits + i), _mm512_set1_ps(top))) i += kPanel;
  while (i < count && to_float(logits[i]) != top) i++;
  *likeliest = i < count ? i : 0;
}

// The rows of which something is wanted, as a step of their own: the others are done when their keys and
// values are kept in the last layer.
struct Last {
  std::vector<int64_t> start, capacity, position;
  BlazeStep step;
  std::vector<int64_t> groups;

  Last(const BlazeStep &whole, const BlazeResult &result) : step(whole) {
    for (int64_t i = 0; i < result.count; i++) {
      const int64_t row = result.rows[i];
      start.push_back(whole.start[row]);
      capacity.push_back(whole.capacity[row]);
      position.push_back(whole.position[row]);
    }
    step.rows = result.count;
    step.start = start.data();
    step.capacity = capacity.data();
    step.position = position.data();
    groups = groups_of(step);
  }
};

// What one thread of the team does.
class Run {
public:
  Run(const BlazeModel &model, const BlazeBuffers &buffers, Scratch &scratch, Team::Member team)
      : model_(model), team_(team), normed_((BFloat *)buffers.normed), attended_((BFloat *)buffers.attended),
        gated_((BFloat *)buffers.gated), scratch_(scratch) {}

  void all(const BlazeStep &step, const std::vector<int64_t> &groups, const Last &last, const BlazeBuffers &buffers,
           const BlazeResult &result) {
    const int64_t hidden = model_.hidden;
    BFloat *qkv = (BFloat *)buffers.qkv, *last_qkv = (BFloat *)buffers.last_qkv;
    each_row(step.rows, [&](int64_t row) { embed(model_, step.id[row], buffers.hidden + row * hidden); });
    for (const BlazeLayer *layer = model_.layer; layer < model_.layer + model_.layers; layer++) {
      norm(buffers.hidden, step.rows, layer->input_norm);
      store_all(team_, scratch_, layer->qkv, normed_, step.rows, qkv);
      // A chunk's rows see each other's keys: all are written before any is read.
      each_row(step.rows, [&](int64_t row) {
        keep(step, layer->heads, row, qkv, (BFloat *)layer->keys, (BFloat *)layer->values);
      });
      if (layer + 1 < model_.layer + model_.layers) finish(*layer, step, groups, qkv, buffers.hidden);
    }
    const BlazeLayer &layer = model_.layer[model_.layers - 1];
    const int64_t width = layer.qkv.outputs;
    each_row(result.count, [&](int64_t i) {
      std::memcpy(last_qkv + i * width, qkv + result.rows[i] * width, width * sizeof(BFloat));
      std::memcpy(buffers.last_hidden + i * hidden, buffers.hidden + result.rows[i] * hidden, hidden * sizeof(float));
    });
    finish(layer, last.step, last.groups, last_qkv, buffers.last_hidden);
    norm(buffers.last_hidden, result.count, model_.final_norm);
    BFloat *logits = (BFloat *)result.logits;
    store_all(team_, scratch_, model_.head, normed_, result.count, logits);
    each_row(result.count, [&](int64_t i) {
      const BFloat *row = logits + i * model_.head.outputs;
      find_largest(row, model_.head.outputs, result.largest + i, result.likeliest + i);
    });
  }

private:
  // Attention and what comes after it.
  void finish(const BlazeLayer &layer, const BlazeStep &step, const std::vector<int64_t> &groups, const BFloat *qkv,
              float *hidden) {
    const BFloat *keys = (const BFloat *)layer.keys, *values = (const BFloat *)layer.values;
    const BlazeHeads &heads = layer.heads;
    const int64_t width = heads.queries * heads.dim, part = width / heads.keys; // of a row, of a head of keys
    BFloat *out = scratch_.attended.get();
    team_.each(
        (int64_t(groups.size()) - 1) * heads.keys,
        [&](int64_t item, int64_t next) {
          attend(step, groups, heads, item, next, qkv, keys, values, scratch_.scores.get(), out, part);
        },
        [&](int64_t item) {
          const int64_t first = groups[item / heads.keys], last = groups[item / heads.keys + 1];
          for (int64_t row = first; row < last; row++)
            std::memcpy(attended_ + row * width + item % heads.keys * part, out + (row - first) * part, part * sizeof(BFloat));
        });
    add_all(team_, scratch_, layer.output, attended_, step.rows, hidden);
    norm(hidden, step.rows, layer.mlp_norm);
    gate_all(team_, scratch_, layer.gate_up, normed_, step.rows, layer.down.inputs, gated_);
    add_all(team_, scratch_, layer.down, gated_, step.rows, hidden);
  }

  void norm(const float *hidden, int64_t rows, const float *weight) {
    each_row(rows, [&](int64_t row) {
      rms_norm(hidden + row * model_.hidden, model_.hidden, model_.eps, weight, normed_ + row * model_.hidden);
    });
  }

  template <typename Do> void each_row(int64_t rows, const Do &row) {
    const int64_t parts = rows < kParts ? rows : kParts;
    team_.each_small(parts, [&](int64_t part) {
      for (int64_t i = rows * part / parts; i < rows * (part + 1) / parts; i++) row(i);
    });
  }

  const BlazeModel &model_;
  Team::Member team_;
  BFloat *normed_, *attended_, *gated_;
  Scratch &scratch_;
};

// Threads that meet every few microseconds must not share a core, and the system is slow to see that they do.
void stay_on_own_core(const BlazeModel &model) {
  static thread_local bool placed = false;
  if (placed || !model.cores) return;
  placed = true;
  const int64_t core = model.cores[omp_get_thread_num()];
  if (core >= CPU_SETSIZE) return;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof(one), &one); // where it fails, the system decides as before
}

// One for each thread, large enough for every layer.
std::vector<Scratch> scratch_of(const BlazeModel &model, const BlazeStep &step) {
  int64_t unpacked = model.head.scales ? model.head.inputs : 0, attended = 0;
  for (const BlazeLayer *layer = model.layer; layer < model.layer + model.layers; layer++) {
    attended = std::max(attended, layer->heads.queries / layer->heads.keys * layer->heads.dim);
    for (const BlazeMatrix *matrix : {&layer->qkv, &layer->output, &layer->gate_up, &layer->down})
      if (matrix->scales) unpacked = std::max(unpacked, matrix->inputs);
  }
  if (step.rows <= kRows) unpacked = 0; // few rows read 8-bit weights as they are
  std::vector<Scratch> all(step.threads);
  for (Scratch &one : all) {
    one.scores.reset(new float[scores_size(step)]);
    one.unpacked.reset(new BFloat[unpacked * kOutputs]);
    one.sums.reset(new float[std::min(step.rows, kRowsOfItem) * kOutputs]);
    one.attended.reset(new BFloat[kTogether * attended]);
  }
  return all;
}

} // namespace

extern "C" {

int64_t blaze_runs_steps() { return 1; }
int64_t blaze_items_overtaken() { return items_overtaken.load(std::memory_order_relaxed); }

// 0, or 1 when there is not enough memory, and then nothing was done.
int64_t blaze_step(const BlazeModel *model, const BlazeStep *step, const BlazeBuffers *buffers, const BlazeResult *result) {
  try {
    Team team(step->threads);
    std::vector<Scratch> scratch = scratch_of(*model, *step);
    const std::vector<int64_t> groups = groups_of(*step);
    const Last last(*step, *result);
#pragma omp parallel num_threads(step->threads) if (step->threads > 1)
    {
      stay_on_own_core(*model);
      const int thread = omp_get_thread_num();
      Run(*model, *buffers, scratch[thread], Team::Member(team, thread)).all(*step, groups, last, *buffers, *result);
    }
  } catch (const std::exception &) { // none gets out of the parallel region: nothing in it allocates
    return 1;
  }
  return 0;
}

} // extern "C"

#else

extern "C" int64_t blaze_runs_steps() { return 0; }
extern "C" int64_t blaze_items_overtaken() { return 0; }

#endif
