#include "runtime/system_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace ktmoe {

std::string read_system_file(const std::string& path) {
  std::string text;
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return text;
  char block[4096];
  for (ssize_t got = 0; (got = read(file, block, sizeof block)) > 0 || (got < 0 && errno == EINTR);)
    if (got > 0) text.append(block, static_cast<size_t>(got));
  close(file);
  return text;
}

}  // namespace ktmoe
