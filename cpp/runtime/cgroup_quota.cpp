// Reads cpu.max (cgroup v2) and cpu.cfs_quota_us (v1).
#include "runtime/cgroup_quota.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <vector>

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
  Limit limit;
  std::ifstream(directory + "/cpu.max") >> limit.quota >> limit.period;
  return limit;
}

Limit read_limit_v1(const std::string& directory) {
  Limit limit;
  std::ifstream(directory + "/cpu.cfs_quota_us") >> limit.quota;
  std::ifstream(directory + "/cpu.cfs_period_us") >> limit.period;
  return limit;
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
  std::vector<std::string> controllers;  // empty: the v2 hierarchy
  std::string path;

  bool is_v2() const { return controllers.empty(); }
  bool limits_cpu() const {
    return is_v2() || std::find(controllers.begin(), controllers.end(), "cpu") != controllers.end();
  }
};

// A line of /proc/self/cgroup: "number:controller,controller:/path".
Membership parse_membership(const std::string& line) {
  std::istringstream fields(line);
  std::string number, names, name;
  Membership result;
  std::getline(fields, number, ':');
  std::getline(fields, names, ':');
  std::getline(fields, result.path);
  std::istringstream list(names);
  while (std::getline(list, name, ',')) result.controllers.push_back(name);
  return result;
}

}  // namespace

std::optional<int> cgroup_cpu_quota(const std::string& sysfs_root, const std::string& proc_root) {
  std::optional<int> least;
  const auto apply = [&least](const Limit& limit) {
    if (limit.exists()) least = std::min(least.value_or(limit.cpus()), limit.cpus());
  };

  const std::string mounts = sysfs_root + "/fs/cgroup";
  std::ifstream memberships(proc_root + "/self/cgroup");
  for (std::string line; std::getline(memberships, line);) {
    const Membership group = parse_membership(line);
    if (!group.limits_cpu()) continue;
    for (const std::string& step : path_to_root(group.path)) {
      if (group.is_v2()) {
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
