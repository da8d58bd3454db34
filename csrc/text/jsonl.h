// The "text" field of a line of JSON, as Python's json.loads reads it.
#pragma once

#include <string>
#include <string_view>

namespace tapelm::text {

// Length of the longest prefix that is valid UTF-8 (overlong forms, surrogates and values above U+10FFFF are not).
size_t valid_utf8(std::string_view text);

// The string in the field "text" of the object in `line` (of equal names, the last). Throws std::invalid_argument,
// the message continuing "line 7 ...", unless the line is one JSON object in UTF-8 with such a field. Accepts NaN and
// Infinity as json.loads does; half of a UTF-16 pair in the text is refused. The result lies in `line`, or
// in `unescaped` where the text has escapes.
std::string_view text_field(std::string_view line, std::string& unescaped);

}  // namespace tapelm::text
