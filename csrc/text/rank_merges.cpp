#include "rank_merges.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string_view>
#include <unordered_map>

namespace tapelm::text {
namespace {

constexpr uint32_t kNone = UINT32_MAX;

// Merges one token after another down to two parts.
class Splitter {
 public:
  explicit Splitter(const std::vector<std::string>& tokens) {
    rank_of_.reserve(tokens.size());
    for (uint32_t rank = 0; rank < tokens.size(); ++rank) {
      const std::string& token = tokens[rank];
      if (token.empty()) continue;
      if (!rank_of_.emplace(token, rank).second) {
        throw std::invalid_argument("the token of rank " + std::to_string(rank) + " has a lower rank, too");
      }
      if (token.size() >= kNone) throw std::invalid_argument("a token of 4 GiB or more");
      longest_ = std::max(longest_, token.size());
    }
    for (uint32_t byte = 0; byte < 256; ++byte) {
      byte_ranks_[byte] = rank(std::string(1, static_cast<char>(byte)));
      if (byte_ranks_[byte] == kNone) {
        throw std::invalid_argument("the vocabulary has no token for byte " + std::to_string(byte));
      }
    }
  }

  // Whether merging makes the token of at least two bytes; `left` and `right` become the parts that it is made of.
  bool split(std::string_view token, uint32_t& left, uint32_t& right) {
    token_ = token;
    parts_.resize(token.size());
    candidates_.clear();
    const auto size = static_cast<uint32_t>(token.size());
    for (uint32_t i = 0; i < size; ++i) {
      parts_[i] = {byte_ranks_[static_cast<uint8_t>(token[i])], kNone, i + 1, i - 1};
    }
    for (uint32_t i = 0; i + 1 < size; ++i) update(i);
    uint32_t count = size;
    while (count > 2 && !candidates_.empty()) {
      const Candidate top = candidates_.front();
      std::pop_heap(candidates_.begin(), candidates_.end(), std::greater<>());
      candidates_.pop_back();
      Part& part = parts_[top.position];
      if (part.joined != top.rank) continue;  // one of its parts has been joined otherwise since
      Part& eaten = parts_[part.next];
      eaten.joined = kNone;
      part.rank = top.rank;
      part.next = eaten.next;
      if (part.next < size) parts_[part.next].previous = top.position;
      update(top.position);
      if (top.position > 0) update(part.previous);
      --count;
    }
    left = parts_[0].rank;
    right = parts_[parts_[0].next].rank;
    return count == 2;
  }

 private:
  struct Part {
    uint32_t rank;
    uint32_t joined;    // rank of this part joined with the next one, kNone where that is no token
    uint32_t next;      // position of the next part: the end of this one
    uint32_t previous;
  };
  struct Candidate {
    uint32_t rank;
    uint32_t position;
    auto operator<=>(const Candidate&) const = default;
  };

  uint32_t rank(std::string_view bytes) const {
    if (bytes.size() > longest_) return kNone;
    const auto found = rank_of_.find(bytes);
    return found == rank_of_.end() ? kNone : found->second;
  }

  void update(uint32_t position) {
    Part& part = parts_[position];
    part.joined = kNone;
    if (part.next == token_.size()) return;
    part.joined = rank(token_.substr(position, parts_[part.next].next - position));
    if (part.joined == kNone) return;
    candidates_.push_back({part.joined, position});
    std::push_heap(candidates_.begin(), candidates_.end(), std::greater<>());
  }

  std::unordered_map<std::string_view, uint32_t> rank_of_;
  size_t longest_ = 0;
  uint32_t byte_ranks_[256];
  std::string_view token_;
  std::vector<Part> parts_;  // by the position of their first byte
  std::vector<Candidate> candidates_;
};

}  // namespace

std::vector<Merge> merges_of_ranks(const std::vector<std::string>& tokens) {
  Splitter splitter(tokens);
  std::vector<Merge> merges;
  for (uint32_t rank = 0; rank < tokens.size(); ++rank) {
    Merge merge{0, 0, rank};
    if (tokens[rank].size() > 1 && splitter.split(tokens[rank], merge.left, merge.right)) merges.push_back(merge);
  }
  return merges;
}

}  // namespace tapelm::text
