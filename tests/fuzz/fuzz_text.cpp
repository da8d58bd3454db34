// libFuzzer target: encoding, against a slow and plain copy of what it means.
//
// The first byte of the input chooses the splitting and the calls; the rest is the text. A fixed vocabulary, given as
// tiktoken ranks, has tokens that rank below their parts, that two pairs could make, and that no pair makes.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <unordered_map>

#include "bpe.h"
#include "rank_merges.h"

using namespace tapelm::text;

namespace {

constexpr int kPretokenizers = 4;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "fuzz_text: %s\n", what);
  std::abort();
}

std::vector<std::string> vocabulary() {
  std::vector<std::string> tokens{"aaaa", "the", " the", "é"};
  for (int byte = 0; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* token : {"aa", "aaa", "ab", "ba", "aba", "bab", "abab", "th", "he", " t", " th", "  ", "    ", "\n\n",
                            "\r\n", "'s", "'ll", "n't", "12", "23", "123", "1234", "in", "ing", " in", "日", "本", "日本",
                            "🚀", "\xe6\x97", "\xf0\x9f", "!!", "xyz", " the the"}) {
    tokens.emplace_back(token);
  }
  tokens.emplace_back("<|end|>");
  tokens.emplace_back("<|end|><|");
  return tokens;
}

struct Fixture {
  std::vector<std::string> tokens = vocabulary();
  std::unordered_map<std::string, uint32_t> rank_of;
  std::vector<uint32_t> specials{static_cast<uint32_t>(tokens.size() - 2), static_cast<uint32_t>(tokens.size() - 1)};
  std::vector<std::unique_ptr<Bpe>> tokenizers;

  Fixture() {
    std::vector<std::string> ranked(tokens.begin(), tokens.end() - 2);
    for (uint32_t rank = 0; rank < ranked.size(); ++rank) rank_of.emplace(ranked[rank], rank);
    const std::vector<Merge> merges = merges_of_ranks(ranked);
    for (int kind = 0; kind < kPretokenizers; ++kind) {
      tokenizers.push_back(
          std::make_unique<Bpe>(BpeModel{tokens, merges, specials, static_cast<Pretokenizer>(kind), true}));
    }
  }
};

// tiktoken's rule: join the leftmost of the adjacent parts whose joined bytes have the lowest rank.
void merge_plainly(const Fixture& fixture, const std::string& word, std::vector<uint32_t>& ids) {
  if (const auto whole = fixture.rank_of.find(word); whole != fixture.rank_of.end()) {
    ids.push_back(whole->second);
    return;
  }
  std::vector<std::string> parts;
  for (const char byte : word) parts.emplace_back(1, byte);
  while (true) {
    uint32_t lowest = UINT32_MAX;
    size_t place = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto joined = fixture.rank_of.find(parts[i] + parts[i + 1]);
      if (joined != fixture.rank_of.end() && joined->second < lowest) lowest = joined->second, place = i;
    }
    if (lowest == UINT32_MAX) break;
    parts[place] += parts[place + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(place) + 1);
  }
  for (const std::string& part : parts) ids.push_back(fixture.rank_of.at(part));
}

template <typename Ids>
bool equal(const Ids& ids, const std::vector<uint32_t>& expected) {
  return std::equal(ids.data(), ids.data() + ids.size(), expected.begin(), expected.end());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Fixture fixture;
  if (size == 0) return 0;
  const int kind = data[0] % kPretokenizers;
  const bool batch = (data[0] & 0x80) != 0;
  const Bpe& bpe = *fixture.tokenizers[static_cast<size_t>(kind)];
  const uint8_t* const end = data + size;
  const std::string_view text(reinterpret_cast<const char*>(data + 1), size - 1);

  const auto ids = bpe.encode(text, true);
  require(bpe.decode({ids.data(), ids.size()}) == text, "decode(encode(text)) is not text");

  if (text.find("<|end|>") == std::string_view::npos) {
    std::vector<uint32_t> expected;
    for (const uint8_t* p = data + 1; p < end;) {
      const size_t length = first_word(static_cast<Pretokenizer>(kind), p, end);
      require(length > 0 && length <= static_cast<size_t>(end - p), "a word of no length or beyond the text");
      merge_plainly(fixture, std::string(reinterpret_cast<const char*>(p), length), expected);
      p += length;
    }
    require(equal(ids, expected), "ids are not those of plain merging");
    require(equal(bpe.encode(text, false), expected), "ids change where special tokens are not allowed");
  } else {
    try {
      bpe.encode(text, false);
      require(false, "a special token was not refused");
    } catch (const std::invalid_argument&) {
    }
  }
  if (batch) {
    const std::string_view texts[] = {text, text.substr(text.size() / 2), text};
    const EncodedBatch encoded = bpe.encode_batch(texts, true, 2);
    require(encoded.offsets.size() == 4 && encoded.offsets[3] == encoded.ids.size(), "offsets of a batch");
    require(std::equal(encoded.ids.data(), encoded.ids.data() + encoded.offsets[1], ids.data(), ids.data() + ids.size()),
            "a batch has other ids");
  }
  return 0;
}
