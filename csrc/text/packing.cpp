#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>

namespace tapelm::text {
namespace {

// A group ends with the document that reaches one of these: large enough for a tight packing, small enough to plan
// in milliseconds.
constexpr uint64_t kGroupTokens = 1 << 22;
constexpr uint64_t kGroupDocuments = 1 << 16;

constexpr uint64_t kNone = ~0ull;

// Open windows by the room left in them; take() finds the least sufficient room, the latest such window first.
class OpenWindows {
 public:
  explicit OpenWindows(uint64_t seq_len) : last_(seq_len + 1, kNone), occupied_(seq_len / 64 + 1, 0) {}

  void put(uint64_t window, uint64_t room) {
    if (room == 0) return;
    if (next_.size() <= window) next_.resize(window + 1);
    next_[window] = last_[room];
    last_[room] = window;
    occupied_[room / 64] |= 1ull << (room % 64);
  }

  // A window with at least `needed` room, removed, and its room; kNone where there is none.
  uint64_t take(uint64_t needed, uint64_t& room) {
    uint64_t bits = occupied_[needed / 64] >> (needed % 64) << (needed % 64);
    for (uint64_t word = needed / 64; ; bits = occupied_[word]) {
      if (bits != 0) {
        room = 64 * word + static_cast<uint64_t>(std::countr_zero(bits));
        break;
      }
      if (++word == occupied_.size()) return kNone;
    }
    const uint64_t window = last_[room];
    last_[room] = next_[window];
    if (last_[room] == kNone) occupied_[room / 64] &= ~(1ull << (room % 64));
    return window;
  }

 private:
  std::vector<uint64_t> last_;      // by room
  std::vector<uint64_t> next_;      // by window: the one below it in the same stack
  std::vector<uint64_t> occupied_;  // one bit per room
};

}  // namespace

Packing::Packing(const ShardSet& shards, uint64_t seq_len) : shards_(shards), seq_len_(seq_len) {
  uint64_t document = 0;
  uint64_t tokens = 0;
  const auto close = [&] {
    first_window_.push_back(first_window_.back() + pack(first_document_.back(), document).windows());
    first_document_.push_back(document);
    tokens = 0;
  };
  shards.each_document(0, shards.documents(), [&](uint64_t begin, uint64_t length) {
    if (document == 0 && begin != 0) throw std::invalid_argument("the first shard does not begin with a document");
    tokens += length;
    ++document;
    if (tokens >= kGroupTokens || document - first_document_.back() >= kGroupDocuments) close();
  });
  if (document > first_document_.back()) close();
  if (document == 0) throw std::invalid_argument("the shards hold no document starts, which order=\"packed\" needs");
}

uint64_t Packing::group_of(uint64_t window) const {
  return static_cast<uint64_t>(std::upper_bound(first_window_.begin(), first_window_.end(), window) -
                               first_window_.begin()) - 1;
}

PackedGroup Packing::plan(uint64_t group) const {
  return pack(first_document_[group], first_document_[group + 1]);
}

PackedGroup Packing::pack(uint64_t first_document, uint64_t last_document) const {
  std::vector<Piece> pieces;  // in the order of the corpus
  uint64_t windows = 0;
  std::vector<uint64_t> window_of;
  std::vector<uint64_t> loose;  // indices of the pieces shorter than T
  shards_.each_document(first_document, last_document, [&](uint64_t begin, uint64_t length) {
    for (; length >= seq_len_; begin += seq_len_, length -= seq_len_) {
      pieces.push_back({begin, seq_len_});
      window_of.push_back(windows++);
    }
    if (length == 0) return;
    loose.push_back(pieces.size());
    pieces.push_back({begin, length});
    window_of.push_back(kNone);
  });
  std::stable_sort(loose.begin(), loose.end(),
                   [&](uint64_t a, uint64_t b) { return pieces[a].tokens > pieces[b].tokens; });
  OpenWindows open(seq_len_);
  for (const uint64_t piece : loose) {
    uint64_t room = seq_len_;
    uint64_t window = open.take(pieces[piece].tokens, room);
    if (window == kNone) window = windows++, room = seq_len_;
    window_of[piece] = window;
    open.put(window, room - pieces[piece].tokens);
  }

  PackedGroup group;
  group.first.assign(windows + 1, 0);
  for (const uint64_t window : window_of) ++group.first[window + 1];
  std::partial_sum(group.first.begin(), group.first.end(), group.first.begin());
  std::vector<uint64_t> end(group.first.begin(), group.first.end() - 1);
  group.pieces.resize(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) group.pieces[end[window_of[i]]++] = pieces[i];
  return group;
}

}  // namespace tapelm::text
