// How much processor time the process's control groups grant it.
#pragma once

#include <optional>
#include <string>

namespace ktmoe {

// The least of the limits (cgroup v1 or v2) on the way from the process's own group up to the root, in whole
// CPUs, rounded up; empty when there is none. The roots are /sys and /proc, or a test's imitation of them.
std::optional<int> cgroup_cpu_quota(const std::string& sysfs_root, const std::string& proc_root);

}  // namespace ktmoe
