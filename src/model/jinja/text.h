// Python's operations on text, over UTF-8: positions and lengths count characters. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace elasticmoe::model::jinja {

bool IsSpace(char32_t code);      // str.isspace
bool IsPrintable(char32_t code);  // str.isprintable

std::size_t CountChars(std::string_view text);
// Byte offset of character `index`; text.size() if there are fewer.
std::size_t OffsetOf(std::string_view text, std::size_t index);

// Takes characters of `chars` (white space where nullopt) off the ends.
std::string_view Strip(std::string_view text, std::optional<std::string_view> chars, bool left, bool right);

// str.split and str.rsplit; `limit` < 0 = none. REQUIRES: separator is not empty.
std::vector<std::string_view> SplitBy(std::string_view text, std::string_view separator, std::int64_t limit,
                                      bool from_right);
std::vector<std::string_view> SplitAtSpace(std::string_view text, std::int64_t limit, bool from_right);
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends);

std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
std::string Title(std::string_view text);

// REQUIRES: old_text is not empty, or the caller has bounded the result. `limit` < 0 = all.
std::string Replace(std::string_view text, std::string_view old_text, std::string_view new_text,
                    std::int64_t limit);
std::size_t CountOf(std::string_view text, std::string_view part);  // without overlap

// repr of a float and of a text.
std::string FormatFloat(double value);
std::string Quote(std::string_view text);

// int(text), float(text).
std::optional<std::int64_t> ParseInteger(std::string_view text, int base);
std::optional<double> ParseFloat(std::string_view text);

}  // namespace elasticmoe::model::jinja
