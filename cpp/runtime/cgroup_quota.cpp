// Reads cpu.max (cgroup v2) and cpu.cfs_quota_us (v1).
#include "runtime/cgroup_quota.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <vector>

#include "runtime/system_file.h"

namespace ktmoe {
namespace {

// Microseconds of processor time per period of wall time.
struct Limit {
  long quota = 0;
  long period = 0;

  bool exists() const { return quota > 0 && period > 0; }
  int cpus() const {
    return static_cast<int>(std::min<long>((quota - 1) / period + 1, std::numeric_limits<int>::max()));
  }
};

// A missing file or a word in place of a number ("max") leaves the limit without effect, as does v1's -1.
Limit read_limit_v2(const std::string& directory) {
  const std::string text = read_system_file(directory + "/cpu.max");
  std::string_view rest = text;
  const auto quota = leading_number<long>(take_until(rest, ' '));
  return {quota.value_or(0), leading_number<long>(rest).value_or(0)};
}

Limit read_limit_v1(const std::string& directory) {
  const auto number = [&](const char* name) {
    return leading_number<long>(read_system_file(directory + name)).value_or(0);
  };
  return {number("/cpu.cfs_quota_us"), number("/cpu.cfs_period_us")};
}

// "/a/b" -> "/a/b", "/a", "". Every group on the way up limits its descendants. In a container the path may
// be the host's while only the container's own group is mounted, at the root: the other steps are missing.
std::vector<std::string> path_to_root(std::string path) {
  std::vector<std::string> steps;
  while (!path.empty()) {
    if (path != "/") steps.push_back(path);
    path.resize(path.rfind('/') == std::string::npos ? 0 : path.rfind('/'));
  }
  steps.emplace_back();
  return steps;
}

struct Membership {
  bool is_v2 = false;  // the one hierarchy of all controllers
  bool limits_cpu = false;
  std::string path;
};

// A line of /proc/self/cgroup: "number:controller,controller:/path", without controllers for v2.
Membership parse_membership(std::string_view line) {
  take_until(line, ':');
  std::string_view controllers = take_until(line, ':');
  Membership group;
  group.is_v2 = group.limits_cpu = controllers.empty();
  while (!controllers.empty()) group.limits_cpu |= take_until(controllers, ',') == "cpu";
  group.path = line;
  return group;
}

}  // namespace

std::optional<int> cgroup_cpu_quota(const std::string& sysfs_root, const std::string& proc_root) {
  std::optional<int> least;
  const auto apply = [&least](const Limit& limit) {
    if (limit.exists()) least = std::min(least.value_or(limit.cpus()), limit.cpus());
  };

  const std::string mounts = sysfs_root + "/fs/cgroup";
  const std::string memberships = read_system_file(proc_root + "/self/cgroup");
  for (std::string_view lines = memberships; !lines.empty();) {
    const Membership group = parse_membership(take_until(lines, '\n'));
    if (!group.limits_cpu) continue;
    for (const std::string& step : path_to_root(group.path)) {
      if (group.is_v2) {
        apply(read_limit_v2(mounts + step));
        apply(read_limit_v2(mounts + "/unified" + step));
      } else {
        apply(read_limit_v1(mounts + "/cpu" + step));
        apply(read_limit_v1(mounts + "/cpu,cpuacct" + step));
      }
    }
  }
  return least;
}

}  // namespace ktmoe
