#include "cuda_check_rows.hpp"

#include <numeric>
#include <random>
#include <string>

namespace sparsek::testing {
namespace {

struct Shape {
  std::int64_t batch, num_q_heads, num_kv_heads, seq_len_q, seq_len_k, head_dim;
};

struct Selection {
  std::int64_t num_selected, window, chunk_size;
};

Row make_row(std::string name, Shape const& s, Selection const& selection, Gate gate) {
  Case c{std::move(name), s.batch, s.num_q_heads, s.num_kv_heads, s.seq_len_q, s.seq_len_k,
         s.head_dim,      {},      gate,          "normal",       "none",      "bhsd"};
  c.select.num_selected = selection.num_selected;
  c.select.window = selection.window;
  c.select.chunk_size = selection.chunk_size;
  return {c};
}

constexpr std::array<Gate, 3> kGates{Gate::kSoftmax, Gate::kValue, Gate::kNone};
constexpr std::array<std::int64_t, 3> kHeadDims{64, 96, 128};

// Every combination of chunk, window and budget; the other properties change from row to row, by a
// fixed random sequence, so that no two of them go together.
void add_grid(std::vector<Row>& rows) {
  std::mt19937 random(11);
  auto const pick = [&](auto const& values) { return values[random() % std::size(values)]; };
  constexpr std::array<std::int64_t, 6> seq_lens{513, 640, 777, 129, 900, 384};
  constexpr std::array<std::int64_t, 6> groups{1, 2, 3, 8, 1, 2};
  std::array<std::string, 5> const scores{"normal", "normal", "ties", "ascending", "half_gap"};
  std::array<std::string, 4> const layouts{"bhsd", "bhsd", "bshd", "sliced"};
  for (std::int64_t const chunk_size : {1, 16, 100, 128, 200, 256, 384}) {
    for (std::int64_t const window : {0, 1, 64, 127, 128, 129, 300}) {
      for (std::int64_t const num_selected : {0, 1, 64, 128, 256}) {
        std::int64_t const seq_len = pick(seq_lens), group = pick(groups);
        Row row = make_row(
            "grid_c" + std::to_string(chunk_size) + "_w" + std::to_string(window) + "_k" +
                std::to_string(num_selected),
            {1, group == 8 ? 8 : 2 * group, group == 8 ? 1 : 2, seq_len, seq_len, pick(kHeadDims)},
            {num_selected, window, chunk_size}, pick(kGates));
        if (random() % 4 == 0) row.c.seq_len_q = 1 + random() % seq_len;
        row.c.scores = pick(scores);
        row.c.layout = pick(layouts);
        rows.push_back(row);
      }
    }
  }
}

// The last few queries of a long sequence: the walk starts far from the first key.
void add_few_queries(std::vector<Row>& rows) {
  for (std::int64_t const seq_len_q : {1, 2, 65, 127, 128, 129, 300}) {
    for (std::int64_t const chunk_size : {1, 100, 128}) {
      rows.push_back(
          make_row("offset_sq" + std::to_string(seq_len_q) + "_c" + std::to_string(chunk_size),
                   {1, 4, 2, seq_len_q, 5003, kHeadDims[seq_len_q % 3]}, {256, 128, chunk_size},
                   kGates[chunk_size % 3]));
    }
  }
}

// Where kernels plan differently: few long heads (a head is shared by many blocks) and many short.
void add_extremes_of_head_count(std::vector<Row>& rows) {
  rows.push_back(
      make_row("two_long_heads", {1, 2, 2, 16384, 16384, 128}, {256, 128, 128}, Gate::kSoftmax));
  rows.push_back(make_row("one_long_group", {1, 3, 1, 8192, 8192, 64}, {128, 64, 1}, Gate::kValue));
  rows.push_back(make_row("heads_1536", {16, 96, 96, 70, 70, 64}, {16, 8, 16}, Gate::kSoftmax));
  rows.push_back(
      make_row("heads_1536_default", {16, 96, 48, 150, 150, 128}, {256, 128, 128}, Gate::kSoftmax));
}

std::string suffix_of(std::int64_t head_dim, std::int64_t chunk_size) {
  return "_d" + std::to_string(head_dim) + "_c" + std::to_string(chunk_size);
}

void add_lengths(std::vector<Row>& rows) {
  for (std::int64_t const head_dim : kHeadDims) {
    for (std::int64_t const chunk_size : {1, 100, 128}) {
      std::string const suffix = suffix_of(head_dim, chunk_size);
      Row row = make_row("ragged" + suffix, {7, 4, 2, 700, 700, head_dim}, {64, 64, chunk_size},
                         Gate::kSoftmax);
      row.c.lengths = "ragged";
      rows.push_back(row);
      row.c.name = "ragged_offset" + suffix;
      row.c.seq_len_q = 190;
      row.c.gate = Gate::kValue;
      rows.push_back(row);
    }
  }
}

void add_packed(std::vector<Row>& rows) {
  struct Sequences {
    char const* name;
    std::vector<std::int64_t> queries, keys;
  };
  std::vector<Sequences> const layouts{
      {"one", {513}, {513}},
      {"some_empty", {0, 129, 0, 300, 1, 0}, {0, 129, 5, 300, 1, 0}},
      {"fewer_queries", {1, 128, 7, 200}, {700, 128, 513, 201}},
      {"many_short", std::vector<std::int64_t>(60, 17), std::vector<std::int64_t>(60, 17)},
      {"decode_like", std::vector<std::int64_t>(8, 1), {900, 1, 2, 128, 129, 300, 513, 64}}};
  for (Sequences const& s : layouts) {
    for (std::int64_t const chunk_size : {1, 100, 128, 200}) {
      std::int64_t const total_q = std::accumulate(s.queries.begin(), s.queries.end(), 0L);
      std::int64_t const total_k = std::accumulate(s.keys.begin(), s.keys.end(), 0L);
      Row row = make_row("packed_" + std::string(s.name) + "_c" + std::to_string(chunk_size),
                         {1, 4, 2, total_q, total_k, kHeadDims[(chunk_size + s.keys.size()) % 3]},
                         {64, 64, chunk_size}, kGates[chunk_size % 3]);
      row.packed_q = s.queries;
      row.packed_k = s.keys;
      rows.push_back(row);
    }
  }
}

// Sequences that end within a tile, query heads that share keys, and tiles enough that a block works
// through many of them: places in shared memory change hands often between whole tiles and ends.
void add_many_ends(std::vector<Row>& rows) {
  std::vector<std::int64_t> const lengths{300, 131, 700, 17,  513, 129,
                                          390, 255, 640, 100, 333, 450};
  std::int64_t const total = std::accumulate(lengths.begin(), lengths.end(), 0L);
  for (std::int64_t const head_dim : {64, 128}) {
    for (std::int64_t const chunk_size : {1, 128}) {
      std::string const suffix = suffix_of(head_dim, chunk_size);
      Row row = make_row("packed_ends" + suffix, {1, 32, 4, total, total, head_dim},
                         {256, 128, chunk_size}, Gate::kSoftmax);
      row.packed_q = row.packed_k = lengths;
      rows.push_back(row);
      row = make_row("ragged_ends" + suffix, {7, 40, 8, 700, 700, head_dim}, {128, 128, chunk_size},
                     Gate::kSoftmax);
      row.c.lengths = "ragged";
      rows.push_back(row);
    }
  }
}

void add_foreign(std::vector<Row>& rows) {
  for (bool const bounded : {false, true}) {
    for (std::int64_t const head_dim : kHeadDims) {
      for (SelectionKind const kind : {SelectionKind::kForeignSelect, SelectionKind::kForeignWindow,
                                       SelectionKind::kForeignRandom}) {
        char const* const name = kind == SelectionKind::kForeignSelect   ? "select"
                                 : kind == SelectionKind::kForeignWindow ? "window"
                                                                         : "random";
        Row row = make_row(std::string("foreign_") + name + "_d" + std::to_string(head_dim) +
                               (bounded ? "_bounded" : ""),
                           {2, 4, 2, 650, 777, head_dim}, {64, 128, 128}, Gate::kNone);
        row.selection = kind;
        row.bounded = bounded;
        if (kind == SelectionKind::kForeignWindow) row.c.batch = 4, row.c.lengths = "ragged";
        rows.push_back(row);
      }
    }
  }
}

void add_scales(std::vector<Row>& rows) {
  for (std::int64_t const head_dim : kHeadDims) {
    std::string const suffix = "_d" + std::to_string(head_dim);
    Row row =
        make_row("peaked" + suffix, {1, 4, 2, 900, 900, head_dim}, {64, 64, 128}, Gate::kSoftmax);
    row.q_scale = 8.0;
    rows.push_back(row);
    row.c.name = "peaked_c1" + suffix;
    row.c.select.chunk_size = 1;
    row.c.gate = Gate::kValue;
    rows.push_back(row);
    row.c.name = "peaked_huge_scores" + suffix;
    row.c.select.chunk_size = 16;
    row.c.gate = Gate::kSoftmax;
    row.c.scores = "huge";
    rows.push_back(row);
    row = make_row("negative_scale" + suffix, {1, 2, 2, 513, 513, head_dim}, {64, 64, 128},
                   Gate::kSoftmax);
    row.sm_scale = -0.07;
    rows.push_back(row);
    row.c.name = "zero_scale" + suffix;
    row.sm_scale = 0.0;
    rows.push_back(row);
  }
}

// 333 keys: the last tile of a head reaches into the next head's rows, which are NaN.
void add_planted_nan(std::vector<Row>& rows) {
  for (std::int64_t const head_dim : kHeadDims) {
    for (std::int64_t const chunk_size : {1, 128}) {
      std::string const suffix = suffix_of(head_dim, chunk_size);
      Row row = make_row("nan_head" + suffix, {2, 6, 3, 333, 333, head_dim}, {64, 64, chunk_size},
                         Gate::kSoftmax);
      row.plant_nan = true;
      rows.push_back(row);
      row.c.name = "nan_head_bshd" + suffix;
      row.c.layout = "bshd";
      rows.push_back(row);
      row = make_row("nan_sequence" + suffix, {1, 4, 2, 0, 0, head_dim}, {64, 64, chunk_size},
                     Gate::kSoftmax);
      row.packed_q = {100, 40, 133};
      row.packed_k = {133, 200, 133};
      row.c.seq_len_q = 273, row.c.seq_len_k = 466;
      row.plant_nan = true;
      rows.push_back(row);
    }
  }
}

}  // namespace

std::vector<Row> all_rows() {
  std::vector<Row> rows;
  add_extremes_of_head_count(rows);  // first, since they take longest
  for (Case const& c : case_table()) rows.push_back({c});
  add_few_queries(rows);
  add_lengths(rows);
  add_packed(rows);
  add_many_ends(rows);
  add_foreign(rows);
  add_scales(rows);
  add_planted_nan(rows);
  add_grid(rows);
  return rows;
}

}  // namespace sparsek::testing
