// Bpe::encode_batch: texts cut into pieces, pieces taken in turn by the threads, ids put together in order.
#include <algorithm>
#include <exception>
#include <shared_mutex>
#include <thread>

#include "bpe.h"

namespace tapelm::text {
namespace {

constexpr size_t kPieceBytes = 256u << 10;  // a longer text is divided where it can be

}  // namespace

// Part of a text, from `begin` on.
struct Bpe::Piece {
  size_t text;
  size_t begin;
  size_t size;
  size_t ids = 0;
};

// The pieces of every text in order. A text is divided only when that cannot change its ids.
std::vector<Bpe::Piece> Bpe::cut(std::span<const std::string_view> texts, bool divide) const {
  std::vector<Piece> pieces;
  pieces.reserve(texts.size());
  for (size_t i = 0; i < texts.size(); ++i) {
    const std::string_view text = texts[i];
    const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
    size_t begin = 0;
    while (divide && specials_allow_cuts_ && text.size() - begin > kPieceBytes) {
      size_t at = begin + kPieceBytes;
      while (at < text.size() && !is_safe_cut(bytes + at)) ++at;
      if (at == text.size()) break;
      pieces.push_back({i, begin, at - begin});
      begin = at;
    }
    pieces.push_back({i, begin, text.size() - begin});
  }
  return pieces;
}

// Work shared by the threads of one call.
class Bpe::Batch {
 public:
  Batch(const Bpe& bpe, std::span<const std::string_view> texts, bool allow_special, std::vector<Piece>& pieces)
      : bpe_(bpe), texts_(texts), allow_special_(allow_special), pieces_(pieces), chunks_{0} {
    size_t bytes = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      bytes += pieces[i].size;
      if (bytes < kPieceBytes && i + 1 < pieces.size()) continue;
      chunks_.push_back(i + 1);
      bytes = 0;
    }
    finished_.resize(chunks_.size() - 1);
    is_finished_.resize(chunks_.size() - 1);
  }

  size_t chunks() const { return finished_.size(); }

  // Takes chunks until none is left; every thread runs this. Ids go straight to their place with a single thread,
  // else through `spare` buffers that stay in the cache.
  void run(bool alone) {
    auto state = bpe_.borrow();
    for (size_t chunk; (chunk = take()) < chunks();) {
      try {
        IdBuffer own = alone ? IdBuffer() : spare();
        IdBuffer& out = alone ? ids_ : own;
        for (size_t i = chunks_[chunk]; i < chunks_[chunk + 1]; ++i) {
          Piece& piece = pieces_[i];
          const size_t before = out.size();
          bpe_.encode_text(texts_[piece.text].substr(piece.begin, piece.size), piece.begin, allow_special_, *state,
                           out);
          piece.ids = out.size() - before;
        }
        if (!alone) finish(chunk, std::move(own));
      } catch (const std::exception&) {
        const std::lock_guard lock(mutex_);
        next_ = chunks();
        if (chunk < fault_chunk_) fault_chunk_ = chunk, fault_ = std::current_exception();
      }
    }
    bpe_.give_back(std::move(state));
  }

  // All ids; rethrows the fault that comes first in the texts.
  IdBuffer result() {
    if (fault_) std::rethrow_exception(fault_);
    ids_.shrink();
    return std::move(ids_);
  }

  void expect(size_t ids) { ids_.reserve(ids); }

 private:
  size_t take() {
    const std::lock_guard lock(mutex_);
    return next_ < chunks() ? next_++ : next_;
  }

  IdBuffer spare() {
    const std::lock_guard lock(mutex_);
    if (spare_.empty()) return {};
    IdBuffer buffer = std::move(spare_.back());
    spare_.pop_back();
    return buffer;
  }

  // Once all chunks before this one have their place in ids_, gives it its own, and those after it that were waiting.
  // Only that is done one thread at a time: copying takes most of the time, first of all the pages that it touches.
  void finish(size_t chunk, IdBuffer&& ids) {
    size_t at, from, to;
    {
      const std::lock_guard lock(mutex_);
      finished_[chunk] = std::move(ids);
      is_finished_[chunk] = true;
      at = ids_.size();
      from = appended_;
      size_t added = 0;
      for (; appended_ < chunks() && is_finished_[appended_]; ++appended_) added += finished_[appended_].size();
      to = appended_;
      if (added > ids_.room()) {
        const std::lock_guard nobody_copies(in_place_);
        ids_.reserve(added);
      }
      ids_.commit(ids_.data() + at + added);
      in_place_.lock_shared();
    }
    uint32_t* write = ids_.data() + at;
    for (size_t i = from; i < to; ++i) write = std::copy_n(finished_[i].data(), finished_[i].size(), write);
    in_place_.unlock_shared();
    const std::lock_guard lock(mutex_);
    for (size_t i = from; i < to; ++i) {
      finished_[i].clear();
      spare_.push_back(std::move(finished_[i]));
    }
  }

  const Bpe& bpe_;
  std::span<const std::string_view> texts_;
  const bool allow_special_;
  std::vector<Piece>& pieces_;
  std::vector<size_t> chunks_;  // pieces chunks_[i] .. chunks_[i + 1] are chunk i
  std::mutex mutex_;
  std::shared_mutex in_place_;  // held by those who copy to ids_, and by who moves it
  size_t next_ = 0;
  size_t appended_ = 0;
  IdBuffer ids_;
  std::vector<IdBuffer> finished_;
  std::vector<bool> is_finished_;
  std::vector<IdBuffer> spare_;
  size_t fault_chunk_ = SIZE_MAX;
  std::exception_ptr fault_;
};

EncodedBatch Bpe::encode_batch(std::span<const std::string_view> texts, bool allow_special, unsigned threads) const {
  if (threads == 0) threads = std::max(1u, std::thread::hardware_concurrency());
  std::vector<Piece> pieces = cut(texts, threads > 1);
  Batch batch(*this, texts, allow_special, pieces);
  size_t bytes = 0;
  for (const std::string_view text : texts) bytes += text.size();
  batch.expect(bytes / 4);
  const auto workers = static_cast<unsigned>(std::min<size_t>(threads, batch.chunks()));
  {
    std::vector<std::jthread> pool;
    for (unsigned i = 1; i < workers; ++i) pool.emplace_back([&] { batch.run(false); });
    batch.run(workers <= 1);
  }
  EncodedBatch result{batch.result(), std::vector<uint64_t>(texts.size() + 1)};
  for (const Piece& piece : pieces) result.offsets[piece.text + 1] += piece.ids;
  for (size_t i = 0; i < texts.size(); ++i) result.offsets[i + 1] += result.offsets[i];
  return result;
}

}  // namespace tapelm::text
