// The small text files in which Linux tells about itself (/proc, /sys).
#pragma once

#include <charconv>
#include <optional>
#include <string>
#include <string_view>

namespace ktmoe {

// The contents of the file; empty when it cannot be read.
std::string read_system_file(const std::string& path);

// Cuts off and returns the text before `separator`, or all of it.
inline std::string_view take_until(std::string_view& text, char separator) {
  const std::string_view part = text.substr(0, text.find(separator));
  text.remove_prefix(part.size() < text.size() ? part.size() + 1 : text.size());
  return part;
}

// The number that the text begins with.
template <class Number>
std::optional<Number> leading_number(std::string_view text) {
  Number number{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc{}) return std::nullopt;
  return number;
}

}  // namespace ktmoe
