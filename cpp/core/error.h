// Exceptions with composed messages: every error names the argument, what was given and what was expected.
#pragma once

#include <concepts>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <string_view>

namespace ktmoe {

// Text, characters and numbers as they read in messages. No streams here nor elsewhere in the library: what
// they print depends on the locale of the process that embeds it.
inline void append_text(std::string& to, std::string_view text) { to += text; }
inline void append_text(std::string& to, char c) { to += c; }
template <std::integral T>
void append_text(std::string& to, T number) {
  to += std::to_string(number);
}
template <std::floating_point T>
void append_text(std::string& to, T number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(number));
  to += text;
}

// Joins its arguments, one after the other, into one string.
template <class... Parts>
std::string str_cat(const Parts&... parts) {
  std::string joined;
  (append_text(joined, parts), ...);
  return joined;
}

// A value, shape or name that cannot be used (ValueError in Python).
template <class... Parts>
[[noreturn]] void throw_invalid(const Parts&... parts) {
  throw std::invalid_argument(str_cat(parts...));
}

// An index outside its range (IndexError in Python).
template <class... Parts>
[[noreturn]] void throw_out_of_range(const Parts&... parts) {
  throw std::out_of_range(str_cat(parts...));
}

// A state or machine in which the call cannot work (RuntimeError in Python).
template <class... Parts>
[[noreturn]] void throw_runtime(const Parts&... parts) {
  throw std::runtime_error(str_cat(parts...));
}

}  // namespace ktmoe
