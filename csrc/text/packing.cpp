#include "packing.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace tapelm::text {
namespace {

// A group ends with the document that reaches one of these: large enough for a tight packing, small enough to plan
// in milliseconds.
constexpr uint64_t kGroupTokens = 1 << 22;
constexpr uint64_t kGroupDocuments = 1 << 16;

constexpr uint64_t kReleasedDocuments = 1 << 18;  // whose starts, 2 MB, may be in memory while windows are counted

constexpr uint64_t kNone = ~0ull;

// A set of rooms left in windows, 0 .. T.
class Rooms {
 public:
  explicit Rooms(uint64_t seq_len) : bits_(seq_len / 64 + 1, 0) {}

  void insert(uint64_t room) { bits_[room / 64] |= 1ull << (room % 64); }
  void erase(uint64_t room) { bits_[room / 64] &= ~(1ull << (room % 64)); }

  // The least room of `needed` or more, kNone where there is none.
  uint64_t least(uint64_t needed) const {
    uint64_t bits = bits_[needed / 64] >> (needed % 64) << (needed % 64);
    for (uint64_t word = needed / 64;; bits = bits_[word]) {
      if (bits != 0) return 64 * word + static_cast<uint64_t>(std::countr_zero(bits));
      if (++word == bits_.size()) return kNone;
    }
  }

 private:
  std::vector<uint64_t> bits_;
};

// Open windows by the room left in them; take() finds the least sufficient room, the latest such window first.
class OpenWindows {
 public:
  explicit OpenWindows(uint64_t seq_len) : last_(seq_len + 1, kNone), rooms_(seq_len) {}

  void put(uint64_t window, uint64_t room) {
    if (room == 0) return;
    if (next_.size() <= window) next_.resize(window + 1);
    next_[window] = last_[room];
    last_[room] = window;
    rooms_.insert(room);
  }

  // A window with at least `needed` room, removed, and its room; kNone where there is none.
  uint64_t take(uint64_t needed, uint64_t& room) {
    const uint64_t least = rooms_.least(needed);
    if (least == kNone) return kNone;
    room = least;
    const uint64_t window = last_[room];
    last_[room] = next_[window];
    if (last_[room] == kNone) rooms_.erase(room);
    return window;
  }

 private:
  std::vector<uint64_t> last_;  // by room
  std::vector<uint64_t> next_;  // by window: the one below it in the same stack
  Rooms rooms_;
};

// How many windows a group fills, without saying which piece goes where: pieces of one length are placed together.
// After a piece the window that took it has the least room of all that could have, so that it takes the next one too.
class WindowCount {
 public:
  explicit WindowCount(uint64_t seq_len)
      : seq_len_(seq_len), pieces_(seq_len, 0), open_(seq_len + 1, 0), rooms_(seq_len) {}

  void add(uint64_t tokens) {
    if (tokens >= seq_len_) {
      const bool narrow = (tokens | seq_len_) <= UINT32_MAX;  // half the time of a 64-bit division
      const uint64_t full =
          narrow ? static_cast<uint32_t>(tokens) / static_cast<uint32_t>(seq_len_) : tokens / seq_len_;
      windows_ += full;
      tokens -= full * seq_len_;
    }
    ++pieces_[tokens];
  }

  // Windows of the documents added since the last call.
  uint64_t take() {
    for (uint64_t length = seq_len_ - 1; length > 0; --length) {
      if (pieces_[length] > 0) place(length, pieces_[length]);
    }
    std::fill(pieces_.begin(), pieces_.end(), 0);
    for (uint64_t room; (room = rooms_.least(0)) != kNone;) close(room, open_[room]);
    return std::exchange(windows_, 0);
  }

 private:
  void place(uint64_t length, uint64_t pieces) {
    while (pieces > 0) {
      const uint64_t least = rooms_.least(length);
      const uint64_t room = least == kNone ? seq_len_ : least;
      const uint64_t fit = room / length;
      if (least == kNone) {
        const uint64_t opened = (pieces + fit - 1) / fit;
        windows_ += opened;
        open(room, opened);
      }
      const uint64_t filled = std::min(open_[room], pieces / fit);
      if (filled > 0) {
        close(room, filled);
        open(room - fit * length, filled);
        pieces -= filled * fit;
      } else {
        close(room, 1);
        open(room - pieces * length, 1);
        pieces = 0;
      }
    }
  }

  void open(uint64_t room, uint64_t windows) {
    if (room == 0) return;
    open_[room] += windows;
    rooms_.insert(room);
  }

  void close(uint64_t room, uint64_t windows) {
    open_[room] -= windows;
    if (open_[room] == 0) rooms_.erase(room);
  }

  uint64_t seq_len_;
  uint64_t windows_ = 0;
  std::vector<uint64_t> pieces_;  // by length
  std::vector<uint64_t> open_;    // by room
  Rooms rooms_;                   // those of open_ above 0
};

}  // namespace

Packing::Packing(const ShardSet& shards, uint64_t seq_len) : shards_(shards), seq_len_(seq_len) {
  uint64_t document = 0;
  uint64_t tokens = 0;
  WindowCount count(seq_len);
  uint64_t released = 0;
  const auto close = [&] {
    first_window_.push_back(first_window_.back() + count.take());
    first_document_.push_back(document);
    tokens = 0;
    if (document - released < kReleasedDocuments) return;
    released = document;
    shards.release_document_starts();
  };
  shards.each_document(0, shards.documents(), [&](uint64_t begin, uint64_t length) {
    if (document == 0 && begin != 0) throw std::invalid_argument("the first shard does not begin with a document");
    count.add(length);
    tokens += length;
    ++document;
    if (tokens >= kGroupTokens || document - first_document_.back() >= kGroupDocuments) close();
  });
  if (document > first_document_.back()) close();
  shards.release_document_starts();
  if (document == 0) throw std::invalid_argument("the shards hold no document starts, which order=\"packed\" needs");
}

uint64_t Packing::group_of(uint64_t window) const {
  return static_cast<uint64_t>(std::upper_bound(first_window_.begin(), first_window_.end(), window) -
                               first_window_.begin()) - 1;
}

PackedGroup Packing::plan(uint64_t group) const {
  std::vector<Piece> pieces;  // in the order of the corpus
  uint64_t windows = 0;
  std::vector<uint64_t> window_of;
  std::vector<uint64_t> loose;  // indices of the pieces shorter than T
  std::vector<uint64_t> place(seq_len_ + 1, 0);  // of the first loose piece of a length, the longest first
  shards_.each_document(first_document_[group], first_document_[group + 1], [&](uint64_t begin, uint64_t length) {
    for (; length >= seq_len_; begin += seq_len_, length -= seq_len_) {
      pieces.push_back({begin, seq_len_});
      window_of.push_back(windows++);
    }
    if (length == 0) return;
    loose.push_back(pieces.size());
    ++place[length - 1];
    pieces.push_back({begin, length});
    window_of.push_back(kNone);
  });
  for (uint64_t length = seq_len_; length-- > 0;) place[length] += place[length + 1];
  std::vector<uint64_t> longest_first(loose.size());
  for (const uint64_t piece : loose) longest_first[place[pieces[piece].tokens]++] = piece;
  OpenWindows open(seq_len_);
  for (const uint64_t piece : longest_first) {
    uint64_t room = seq_len_;
    uint64_t window = open.take(pieces[piece].tokens, room);
    if (window == kNone) window = windows++, room = seq_len_;
    window_of[piece] = window;
    open.put(window, room - pieces[piece].tokens);
  }

  PackedGroup plan;
  plan.first.assign(windows + 1, 0);
  for (const uint64_t window : window_of) ++plan.first[window + 1];
  std::partial_sum(plan.first.begin(), plan.first.end(), plan.first.begin());
  std::vector<uint64_t> end(plan.first.begin(), plan.first.end() - 1);
  plan.pieces.resize(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) plan.pieces[end[window_of[i]]++] = pieces[i];
  return plan;
}

}  // namespace tapelm::text
