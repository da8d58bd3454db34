// split_gpt2 for one instruction set, out of its classify() and write_places(); included by split_ascii.cpp alone.

// Bytes of the contraction at the apostrophe p, or 0.
inline uint32_t contraction(const uint8_t* p) {
  const uint8_t a = p[1], b = p[2];
  if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
  return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? 3 : 0;
}

inline bool is_space(uint8_t byte) { return byte == ' ' || static_cast<uint8_t>(byte - '\t') < 5; }

// A word begins where the class changes, with these exceptions: a blank belongs to the letters, digits or others that
// follow it; of a run of white space only the last character may be a word's beginning besides the first; and a
// contraction ends after its letters.
size_t split_gpt2(const uint8_t* begin, const uint8_t* end, const uint8_t* base, uint32_t* ends, size_t capacity) {
  uint8_t tail[2 * kBlock];
  uint32_t* write = ends;
  const uint32_t* const full = ends + (capacity - kSplitSlack);
  const auto total = static_cast<size_t>(end - begin);
  const auto origin = static_cast<uint32_t>(begin - base);
  Masks before;             // of the last block, of which only the highest bits matter
  uint64_t forced = 0;      // beginnings in the next block that a contraction asks for
  uint64_t suppressed = 1;  // and beginnings that it takes away; the first word's own beginning ends no word
  uint64_t at_begin = 1;    // yet an apostrophe there may begin a contraction
  for (size_t offset = 0; write <= full && offset < kMaxOffset; offset += kBlock) {
    const size_t left = total - offset;
    const uint8_t* block = begin + offset;
    if (left < kBlock + kLookAhead) {
      std::memset(tail, ' ', sizeof tail);  // the end of the text acts like white space
      std::memcpy(tail, block, left);
      block = tail;
    }
    const Masks now = classify(block);
    const auto previous = [](uint64_t mask, uint64_t mask_before) { return mask << 1 | mask_before >> 63; };
    const uint64_t other = ~(now.letter | now.digit | now.space);
    const uint64_t other_before = ~(before.letter | before.digit | before.space);
    const uint64_t same = (now.letter & previous(now.letter, before.letter)) |
                          (now.digit & previous(now.digit, before.digit)) | (other & previous(other, other_before));
    const uint64_t last_of_run = ~now.space >> 1 | static_cast<uint64_t>(!is_space(block[kBlock])) << 63;
    uint64_t starts = (~now.space & ~same & ~previous(now.blank, before.blank)) |
                      (now.space & (~previous(now.space, before.space) | last_of_run));
    uint64_t quotes = now.apostrophe & (starts | at_begin);
    starts = (starts & ~suppressed) | forced;
    forced = suppressed = at_begin = 0;
    for (; quotes != 0; quotes &= quotes - 1) {
      const auto at = static_cast<uint32_t>(std::countr_zero(quotes));
      const uint32_t length = contraction(block + at);
      if (length == 0) continue;
      if (at + 1 < kBlock) {
        starts &= ~(2ull << at);
      } else {
        suppressed = 1;
      }
      if (at + length < kBlock) {
        starts |= 1ull << (at + length);
      } else {
        forced |= 1ull << (at + length - kBlock);
      }
    }
    // Beginnings at the end of the text are none; what is just before a non-ASCII character depends on its class.
    uint64_t valid = block[kBlock] < 0x80 ? ~0ull : ~0ull >> 1;
    if (left < kBlock) valid = (1ull << left) - 1;
    if (now.high != 0) valid &= ((now.high & -now.high) - 1) >> 1;
    starts &= valid;
    const auto place = origin + static_cast<uint32_t>(offset);
    write_places(starts, place, write);
    write += std::popcount(starts);
    if (now.high != 0) break;
    if (left <= kBlock) {
      *write++ = origin + static_cast<uint32_t>(total);
      break;
    }
    before = now;
  }
  return static_cast<size_t>(write - ends);
}
