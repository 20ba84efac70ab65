// Does the engine see the machine as it is? Asked about imitated machines, and a little about this one.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "runtime/topology.h"

using ktmoe::Topology;
namespace fs = std::filesystem;

namespace {

// A directory that imitates /sys and /proc, gone with the object.
class FakeMachine {
 public:
  FakeMachine() {
    std::string pattern = (fs::temp_directory_path() / "ktmoe_machine_XXXXXX").string();
    REQUIRE(mkdtemp(pattern.data()) != nullptr);
    root_ = pattern;
  }
  ~FakeMachine() { fs::remove_all(root_); }

  void write(const std::string& path, const std::string& text) const {
    const fs::path file = fs::path(root_) / path;
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }

  Topology read(const std::vector<int>& affinity) const {
    return Topology::read(root_ + "/sys", root_ + "/proc", affinity);
  }

 private:
  std::string root_;
};

using Cpus = std::vector<int>;
using Nodes = std::map<int, Cpus>;

Cpus range(int first, int last) {
  Cpus cpus;
  for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  return cpus;
}

}  // namespace

TEST_CASE("topology: CPUs are those in the affinity mask and online") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-3,6,8-9");
  machine.write("sys/devices/system/node/node0/cpulist", "0-9");
  machine.write("sys/devices/system/node/online", "0");
  const Topology topology = machine.read({1, 2, 3, 4, 8, 20});
  CHECK(topology.cpus == Cpus{1, 2, 3, 8});
  CHECK(topology.node_cpus == Nodes{{0, {1, 2, 3, 8}}});
  CHECK(topology.cpu_quota == 4);
}

TEST_CASE("topology: several nodes, one without CPUs, one without allowed CPUs") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-7");
  machine.write("sys/devices/system/node/node0/cpulist", "0-1,4-5");
  machine.write("sys/devices/system/node/node1/cpulist", "2-3");
  machine.write("sys/devices/system/node/node2/cpulist", "");
  machine.write("sys/devices/system/node/node10/cpulist", "6-7");
  machine.write("sys/devices/system/node/online", "0-2,10\n");
  machine.write("sys/devices/system/node/possible", "0-11");
  CHECK(machine.read({0, 1, 4, 5, 6, 7}).node_cpus == Nodes{{0, {0, 1, 4, 5}}, {10, {6, 7}}});
}

TEST_CASE("topology: a machine without NUMA information is node 0") {
  FakeMachine machine;
  CHECK(machine.read({2, 3}).cpus == Cpus{2, 3});
  CHECK(machine.read({2, 3}).node_cpus == Nodes{{0, {2, 3}}});
}

TEST_CASE("topology: a CPU that no node lists is not lost") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-3");
  machine.write("sys/devices/system/node/node1/cpulist", "0-1");
  machine.write("sys/devices/system/node/node2/cpulist", "3");
  machine.write("sys/devices/system/node/online", "1-2");
  CHECK(machine.read(range(0, 3)).node_cpus == Nodes{{1, {0, 1, 2}}, {2, {3}}});
}

TEST_CASE("topology: physical cores are filled before hyperthreads") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-7");
  for (int cpu = 0; cpu < 8; ++cpu) {
    machine.write("sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list",
                  std::to_string(cpu / 2 * 2) + "-" + std::to_string(cpu / 2 * 2 + 1));
  }
  CHECK(machine.read(range(0, 7)).node_cpus.at(0) == Cpus{0, 2, 4, 6, 1, 3, 5, 7});
  CHECK(machine.read(range(0, 7)).cpus == range(0, 7));
  // A hyperthread whose sibling is not allowed has the core for itself.
  CHECK(machine.read({1, 2, 3}).node_cpus.at(0) == Cpus{1, 2, 3});
}

TEST_CASE("topology: quota of cgroup v2, the least on the way to the root") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-15");
  machine.write("proc/self/cgroup", "0::/user/job/inner");
  CHECK(machine.read(range(0, 15)).cpu_quota == 16);
  machine.write("sys/fs/cgroup/user/job/inner/cpu.max", "max 100000");
  CHECK(machine.read(range(0, 15)).cpu_quota == 16);
  machine.write("sys/fs/cgroup/user/cpu.max", "650000 100000");
  CHECK(machine.read(range(0, 15)).cpu_quota == 7);  // 6.5 rounded up
  machine.write("sys/fs/cgroup/user/job/cpu.max", "400000 200000");
  CHECK(machine.read(range(0, 15)).cpu_quota == 2);
  machine.write("sys/fs/cgroup/user/job/cpu.max", "1000 100000");
  CHECK(machine.read(range(0, 15)).cpu_quota == 1);
}

TEST_CASE("topology: a quota beyond the CPUs changes nothing") {
  FakeMachine machine;
  machine.write("proc/self/cgroup", "0::/");
  machine.write("sys/fs/cgroup/cpu.max", "800000 100000");
  CHECK(machine.read({0, 1}).cpu_quota == 2);
}

TEST_CASE("topology: quota of cgroup v1, seen from inside a container") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-15");
  machine.write("proc/self/cgroup", "9:cpuset:/docker/ab\n4:cpu,cpuacct:/docker/ab\n1:memory:/docker/ab");
  machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000");
  machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1");
  CHECK(machine.read(range(0, 15)).cpu_quota == 16);
  machine.write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "250000");
  CHECK(machine.read(range(0, 15)).cpu_quota == 3);
}

TEST_CASE("topology: a controller other than cpu limits nothing") {
  FakeMachine machine;
  machine.write("sys/devices/system/cpu/online", "0-3");
  machine.write("proc/self/cgroup", "2:cpuacct:/a");
  machine.write("sys/fs/cgroup/cpu/a/cpu.cfs_period_us", "100000");
  machine.write("sys/fs/cgroup/cpu/a/cpu.cfs_quota_us", "100000");
  CHECK(machine.read(range(0, 3)).cpu_quota == 4);
}

TEST_CASE("topology: this machine") {
  const Topology topology = Topology::read();
  REQUIRE(!topology.cpus.empty());
  CHECK(std::is_sorted(topology.cpus.begin(), topology.cpus.end()));
  CHECK(topology.cpu_quota >= 1);
  CHECK(topology.cpu_quota <= static_cast<int>(topology.cpus.size()));
  Cpus on_nodes;
  for (const auto& [node, cpus] : topology.node_cpus) {
    CHECK(!cpus.empty());
    on_nodes.insert(on_nodes.end(), cpus.begin(), cpus.end());
  }
  std::sort(on_nodes.begin(), on_nodes.end());
  CHECK(on_nodes == topology.cpus);
}

TEST_CASE("bind_memory: keeps contents, refuses nodes that cannot exist") {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t bytes = 8 * page;
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  REQUIRE(memory != MAP_FAILED);
  auto* data = static_cast<unsigned char*>(memory);
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(i % 251);
  // A sandbox may forbid the call, so it need not succeed, but it must do no harm.
  ktmoe::bind_memory(data + 10, bytes - 20, Topology::read().node_cpus.begin()->first);
  CHECK(std::all_of(data, data + bytes,
                    [&](unsigned char& c) { return c == static_cast<unsigned char>((&c - data) % 251); }));
  CHECK(ktmoe::bind_memory(data, 0, 0));
  CHECK(ktmoe::bind_memory(data + 1, page, 0));  // no whole page in it
  CHECK(!ktmoe::bind_memory(data, bytes, -1));
  CHECK(!ktmoe::bind_memory(data, bytes, 1 << 20));
  munmap(memory, bytes);
}
