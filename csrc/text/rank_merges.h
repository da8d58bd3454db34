// The merges behind a tiktoken rank file, which lists nothing but tokens.
//
// tiktoken joins, again and again, the adjacent parts whose joined bytes have the lowest rank, leftmost first. Take a
// place where this makes the token t. Until then nothing has crossed the borders of its bytes, and the lowest,
// leftmost pair of a text is also that of any stretch that holds it: the steps inside are those of merging the bytes
// of t alone. So t is made of the same two parts everywhere, the two that are left when t alone is merged down to two,
// and the list of these pairs in the order of rank merges every text as the ranks do. A token that alone gets stuck
// with three parts or more is never made by merging: tiktoken gives it for a whole word only, as
// BpeModel::ignore_merges does.
#pragma once

#include <string>
#include <vector>

#include "bpe.h"

namespace tapelm::text {

// Merges of the tokens, whose rank is their index, in the order of rank; an empty string is a rank without a token.
// Throws std::invalid_argument when a byte has no token or two tokens are equal.
std::vector<Merge> merges_of_ranks(const std::vector<std::string>& tokens);

}  // namespace tapelm::text
