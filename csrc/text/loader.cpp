#include "loader.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "flat_map.h"
#include "isa.h"

namespace tapelm::text {
namespace {

constexpr int64_t kIgnoredTarget = -100;  // ignore_index of PyTorch's losses

// Where the windows of a batch go: a row of T each.
struct Rows {
  int64_t* inputs;
  int64_t* targets;
  int32_t* document_ids;
};

// `length` inputs out of one token more, in rows of seq_len. csrc/cuda/assemble.h says the same token by token; these
// loops are written for the vectorizer.
template <typename Token>
[[gnu::always_inline]] inline void assemble_anywhere(const Token* tokens, size_t length, size_t seq_len,
                                                     Token end_of_text, bool packed, Rows row) {
  for (size_t t = 0; t < length; ++t) row.inputs[t] = tokens[t];
  std::fill(row.inputs + length, row.inputs + seq_len, end_of_text);
  if (packed) {
    for (size_t t = 0; t < length; ++t) {
      const int64_t next = tokens[t + 1];
      row.targets[t] = tokens[t] == end_of_text ? kIgnoredTarget : next;
    }
    std::fill(row.targets + length, row.targets + seq_len, kIgnoredTarget);
  } else {
    for (size_t t = 0; t < length; ++t) row.targets[t] = tokens[t + 1];
  }
  int32_t document = 0;
  for (size_t t = 0; t < length;) {
    const size_t block = std::min<size_t>(length - t, 64);
    uint32_t ends = 0;
    for (size_t i = 0; i < block; ++i) ends += tokens[t + i] == end_of_text;
    if (ends == 0) {
      std::fill_n(row.document_ids + t, block, document);
    } else {
      for (size_t i = 0; i < block; ++i) {
        row.document_ids[t + i] = document;
        document += tokens[t + i] == end_of_text;
      }
    }
    t += block;
  }
  std::fill(row.document_ids + length, row.document_ids + seq_len, document);
}

#ifdef TAPELM_TEXT_AVX2
template <typename Token>
[[gnu::target("avx2")]] void assemble_avx2(const Token* tokens, size_t length, size_t seq_len, Token end_of_text,
                                           bool packed, Rows row) {
  assemble_anywhere(tokens, length, seq_len, end_of_text, packed, row);
}

template <typename Token>
[[gnu::target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")]] void assemble_avx512(
    const Token* tokens, size_t length, size_t seq_len, Token end_of_text, bool packed, Rows row) {
  assemble_anywhere(tokens, length, seq_len, end_of_text, packed, row);
}
#endif

template <typename Token>
void assemble(const uint8_t* row, size_t length, size_t seq_len, uint32_t end_of_text, bool packed, Rows out) {
  const auto* tokens = reinterpret_cast<const Token*>(row);
#ifdef TAPELM_TEXT_AVX2
  if (use_avx512()) return assemble_avx512(tokens, length, seq_len, static_cast<Token>(end_of_text), packed, out);
  if (use_avx2()) return assemble_avx2(tokens, length, seq_len, static_cast<Token>(end_of_text), packed, out);
#endif
  assemble_anywhere(tokens, length, seq_len, static_cast<Token>(end_of_text), packed, out);
}

template <typename Token>
void pad(uint8_t* row, size_t from, size_t to, uint32_t end_of_text) {
  auto* tokens = reinterpret_cast<Token*>(row);
  std::fill(tokens + from, tokens + to, static_cast<Token>(end_of_text));
}

}  // namespace

Permutation::Permutation(uint64_t size, uint64_t seed, uint64_t epoch)
    : size_(size), half_bits_((std::max(2u, static_cast<uint32_t>(std::bit_width(size > 0 ? size - 1 : 0))) + 1) / 2) {
  uint64_t state = mix(seed + 0x9E3779B97F4A7C15ull) ^ mix(epoch + 0xD1B54A32D192ED03ull);
  for (uint64_t& key : keys_) key = mix(state += 0x9E3779B97F4A7C15ull);
}

// One pass through the network, whose value may be outside.
inline uint64_t Permutation::pass(uint64_t index) const {
  const uint64_t mask = (1ull << half_bits_) - 1;
  uint64_t left = index >> half_bits_;
  uint64_t right = index & mask;
  for (const uint64_t key : keys_) {
    const uint64_t swapped = left ^ (mix(right ^ key) & mask);
    left = right;
    right = swapped;
  }
  return left << half_bits_ | right;
}

uint64_t Permutation::operator()(uint64_t index) const {
  do index = pass(index);
  while (index >= size_);
  return index;
}

// Every index passes once, then those that are outside once more, ...: no pass waits for the one before.
void Permutation::map(std::span<uint64_t> indices) const {
  std::vector<uint64_t*> outside;
  for (uint64_t& index : indices) outside.push_back(&index);
  while (!outside.empty()) {
    size_t kept = 0;
    for (uint64_t* const index : outside) {
      *index = pass(*index);
      outside[kept] = index;
      kept += *index >= size_;
    }
    outside.resize(kept);
  }
}

Loader::Loader(const std::vector<std::string>& paths, uint32_t end_of_text, LoaderOptions options)
    : shards_(paths), end_of_text_(end_of_text), options_(options) {
  const uint64_t tokens = shards_.tokens();
  const bool packed = options.order == Order::kPacked;
  const uint64_t least = packed ? options.seq_len : options.seq_len + 1;
  if (tokens < least) {
    throw std::invalid_argument("corpus of " + std::to_string(tokens) + " tokens is smaller than one block of " +
                                std::to_string(least) + (packed ? " (seq_len)" : " (seq_len + 1)") +
                                ": add text or lower seq_len");
  }
  windows_ = packed ? packing_.emplace(shards_, options.seq_len).windows() : (tokens - 1) / options.seq_len;
  if (steps_per_epoch() == 0) {
    throw std::invalid_argument("corpus of " + std::to_string(tokens) + " tokens has " + std::to_string(windows_) +
                                " blocks of seq_len " + std::to_string(options.seq_len) +
                                ", fewer than batch_size x world_size = " +
                                std::to_string(options.batch_size * options.world_size) +
                                ": add text or lower batch_size or seq_len");
  }
}

void Loader::enter_epoch(uint64_t epoch, LoaderCursor& cursor) const {
  const Permutation groups(packing_->groups(), options_.seed, epoch);
  cursor.epoch_starts.assign(1, 0);
  for (uint64_t k = 0; k < packing_->groups(); ++k) {
    const uint64_t group = groups(k);
    const uint64_t size = packing_->first_window(group + 1) - packing_->first_window(group);
    cursor.epoch_starts.push_back(cursor.epoch_starts.back() + size);
  }
  cursor.epoch = epoch;
}

std::vector<uint64_t> Loader::window_indices(uint64_t step, LoaderCursor& cursor) const {
  const uint64_t epoch = step / steps_per_epoch();
  const uint64_t within = step % steps_per_epoch();
  const uint64_t first = (within * options_.world_size + options_.rank) * options_.batch_size;
  std::vector<uint64_t> indices(options_.batch_size);
  for (uint64_t i = 0; i < options_.batch_size; ++i) indices[i] = first + i;
  if (options_.order == Order::kShuffled) {
    const Permutation permutation(windows_, options_.seed, epoch);
    permutation.map(indices);
  } else if (options_.order == Order::kPacked) {
    if (cursor.epoch != epoch) enter_epoch(epoch, cursor);
    const Permutation groups(packing_->groups(), options_.seed, epoch);
    const auto& starts = cursor.epoch_starts;
    for (auto run = indices.begin(); run != indices.end();) {  // those that are in the same group
      const auto next = std::upper_bound(starts.begin(), starts.end(), *run);
      const uint64_t start = *(next - 1), size = *next - start;
      const uint64_t group = groups(static_cast<uint64_t>(next - starts.begin()) - 1);
      const auto end = std::lower_bound(run, indices.end(), *next);
      for (auto index = run; index != end; ++index) *index -= start;
      Permutation(size, options_.seed ^ mix(group + 1), epoch).map({run, end});
      for (; run != end; ++run) *run += packing_->first_window(group);
    }
  }
  return indices;
}

// The windows of a step; those of the next are in cursor.asked. Windows are far apart in memory, and their cache misses
// would follow one another: they are prefetched one step ahead.
std::vector<uint64_t> Loader::asked_windows(uint64_t step, LoaderCursor& cursor) const {
  if (options_.order == Order::kSequential) return window_indices(step, cursor);
  std::vector<uint64_t> indices =
      cursor.asked_step == step ? std::move(cursor.asked) : window_indices(step, cursor);
  cursor.asked_step = step + 1;
  cursor.asked = window_indices(step + 1, cursor);
  return indices;
}

void Loader::ask(uint64_t index, const LoaderCursor& cursor) const {
  if (options_.order == Order::kShuffled) return shards_.prefetch(index * options_.seq_len, options_.seq_len + 1);
  if (cursor.group == kNoGroup) return;
  const uint64_t local = index - packing_->first_window(cursor.group);
  if (local >= cursor.plan.windows()) return;  // of a group that is not planned yet
  for (uint64_t i = cursor.plan.first[local]; i < cursor.plan.first[local + 1]; ++i) {
    shards_.prefetch(cursor.plan.pieces[i].begin, cursor.plan.pieces[i].tokens);
  }
}

// Copies the tokens of a window into `row` and returns how many of them are inputs.
uint32_t Loader::copy_window(uint64_t index, LoaderCursor& cursor, uint8_t* row) const {
  const size_t width = shards_.token_bytes();
  const uint64_t seq_len = options_.seq_len;
  if (options_.order != Order::kPacked) {
    shards_.copy(index * seq_len, seq_len + 1, row);
    return static_cast<uint32_t>(seq_len);
  }
  if (cursor.group == kNoGroup || index - packing_->first_window(cursor.group) >= cursor.plan.windows()) {
    const uint64_t group = packing_->group_of(index);
    cursor.group = kNoGroup;  // should planning fail, there is no plan
    cursor.plan = packing_->plan(group);
    cursor.group = group;
  }
  const uint64_t local = index - packing_->first_window(cursor.group);
  uint64_t length = 0;
  if (local >= cursor.plan.windows()) throw std::invalid_argument("the shards have changed while they are open");
  for (uint64_t i = cursor.plan.first[local]; i < cursor.plan.first[local + 1]; ++i) {
    const Piece& piece = cursor.plan.pieces[i];
    // A full window may be the inside of a document, whose next token is then the last target.
    const uint64_t more = piece.tokens == seq_len && piece.begin + seq_len < tokens() ? 1 : 0;
    shards_.copy(piece.begin, piece.tokens + more, row + length * width);
    length += piece.tokens;
    if (more) return static_cast<uint32_t>(seq_len);
  }
  (width == 2 ? pad<uint16_t> : pad<uint32_t>)(row, length, seq_len + 1, end_of_text_);
  return static_cast<uint32_t>(length);
}

void Loader::fill(uint64_t step, LoaderCursor& cursor, int64_t* inputs, int64_t* targets,
                  int32_t* document_ids) const {
  const size_t seq_len = options_.seq_len;
  const bool packed = options_.order == Order::kPacked;
  cursor.row.resize((seq_len + 1) * shards_.token_bytes());
  Rows out{inputs, targets, document_ids};
  const std::vector<uint64_t> indices = asked_windows(step, cursor);
  for (size_t i = 0; i < indices.size(); ++i) {
    if (i < cursor.asked.size()) ask(cursor.asked[i], cursor);
    const uint8_t* row = packed ? nullptr : shards_.view(indices[i] * seq_len, seq_len + 1);
    uint32_t length = static_cast<uint32_t>(seq_len);
    if (row == nullptr) {
      row = cursor.row.data();
      length = copy_window(indices[i], cursor, cursor.row.data());
    }
    const auto assemble_row = shards_.token_bytes() == 2 ? assemble<uint16_t> : assemble<uint32_t>;
    assemble_row(row, length, seq_len, end_of_text_, packed, out);
    out = {out.inputs + seq_len, out.targets + seq_len, out.document_ids + seq_len};
  }
}

void Loader::fill_rows(uint64_t step, LoaderCursor& cursor, uint8_t* rows, uint32_t* lengths) const {
  const std::vector<uint64_t> indices = asked_windows(step, cursor);
  for (size_t i = 0; i < indices.size(); ++i) {
    if (i < cursor.asked.size()) ask(cursor.asked[i], cursor);
    *lengths++ = copy_window(indices[i], cursor, rows);
    rows += (options_.seq_len + 1) * shards_.token_bytes();
  }
}

}  // namespace tapelm::text
