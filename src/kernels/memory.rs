//! How much memory a device has, and how much of it is free.

use std::io;
use std::path::Path;

use candle_core::Device;

/// Memory of a device; main memory, as far as the process may use it, for the CPU. Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What an allocation can still get.
    pub free: u64,
    /// All of it.
    pub total: u64,
}

/// Asks the driver, or the kernel for the CPU. What candle has let go of on a GPU counts as free once the device has
/// caught up: the pool keeps it, for the next who asks.
pub fn device_memory(device: &Device) -> candle_core::Result<DeviceMemory> {
    match device {
        Device::Cpu => main_memory(Path::new("/proc"), Path::new("/sys/fs/cgroup")).map_err(candle_core::Error::from),
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => {
            let (free, total) = gpu.cuda_stream().context().mem_get_info().map_err(candle_core::Error::wrap)?;
            let total = total as u64;
            Ok(DeviceMemory { free: total.min(free as u64 + super::cuda::idle_bytes(gpu)), total })
        }
        _ => candle_core::bail!("the memory of {device:?} cannot be asked for"),
    }
}

/// Most bytes that the process had of a GPU's memory for tensors, and most of them in use at one time; `None` where nobody counts.
pub fn device_peak(device: &Device) -> Option<[u64; 2]> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(gpu) => super::cuda::peak_bytes(gpu),
        _ => None,
    }
}

/// `MemAvailable` and `MemTotal`, or what the tightest control group above the process leaves where that is less.
fn main_memory(proc: &Path, groups: &Path) -> io::Result<DeviceMemory> {
    let text = std::fs::read_to_string(proc.join("meminfo"))?;
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {name}")))
    };
    let mut memory = DeviceMemory { free: field("MemAvailable")?, total: field("MemTotal")? };
    // Absent where there are no control groups.
    let member = std::fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    for line in member.lines() {
        let mut parts = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
        let (root, names) = if controllers.is_empty() {
            (groups.to_path_buf(), ["memory.max", "memory.current"])
        } else if controllers.split(',').any(|one| one == "memory") {
            (groups.join("memory"), ["memory.limit_in_bytes", "memory.usage_in_bytes"])
        } else {
            continue;
        };
        // In a container the path may be the host's, and then only the root is there to be read.
        for folder in Path::new(path.trim_start_matches('/')).ancestors() {
            if let Some(group) = group_memory(&root.join(folder), names) {
                memory.free = memory.free.min(group.free);
                memory.total = memory.total.min(group.total);
            }
        }
    }
    Ok(memory)
}

/// What a control group leaves; `None` where it sets no limit. Cached files count as used there, but are given up when asked for.
fn group_memory(folder: &Path, [limit, used]: [&str; 2]) -> Option<DeviceMemory> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    let (total, used) = (number(limit)?, number(used)?);
    let stat = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let of = |key: &str| stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse::<u64>().ok());
    let cached = |name: &str| of(&format!("total_{name}")).or_else(|| of(name)).unwrap_or(0);
    let held = used.saturating_sub(cached("inactive_file") + cached("active_file"));
    Some(DeviceMemory { free: total.saturating_sub(held), total })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine of 8 GiB, 6 of them available, whose process is in these groups; files by path under the groups' root.
    fn machine(member: &str, files: &[(&str, String)]) -> DeviceMemory {
        let root = tempfile::tempdir().unwrap();
        let write = |path: std::path::PathBuf, text: &str| {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let info = format!("MemTotal: {} kB\nMemFree: 5 kB\nMemAvailable: {} kB\n", (8 * GIB) >> 10, (6 * GIB) >> 10);
        write(root.path().join("proc/meminfo"), &info);
        write(root.path().join("proc/self/cgroup"), member);
        files.iter().for_each(|(path, text)| write(root.path().join("groups").join(path), text));
        main_memory(&root.path().join("proc"), &root.path().join("groups")).unwrap()
    }

    #[test]
    fn without_limits_it_is_what_the_machine_has() {
        assert_eq!(machine("", &[]), DeviceMemory { free: 6 * GIB, total: 8 * GIB });
        let unlimited = [("a/memory.max", "max\n".into()), ("a/memory.current", "9".into())];
        assert_eq!(machine("0::/a\n", &unlimited), DeviceMemory { free: 6 * GIB, total: 8 * GIB });
    }

    #[test]
    fn the_tightest_group_above_the_process_counts() {
        let gib = |count: u64| (count * GIB).to_string();
        let files = [
            ("a/memory.max", gib(4)),
            ("a/memory.current", gib(3)),
            ("a/memory.stat", format!("anon {GIB}\ninactive_file {GIB}\nactive_file {GIB}\n")),
            ("a/b/memory.max", "max".into()),
            ("a/b/memory.current", gib(1)),
        ];
        assert_eq!(machine("0::/a/b\n", &files), DeviceMemory { free: 3 * GIB, total: 4 * GIB });
        // Groups of the first kind, seen from a container: the host's path is not there.
        let files = [
            ("memory/memory.limit_in_bytes", gib(2)),
            ("memory/memory.usage_in_bytes", gib(1)),
            ("memory/memory.stat", format!("inactive_file 1\ntotal_inactive_file {}\n", GIB / 2)),
        ];
        let found = machine("5:devices:/x\n4:memory:/docker/deadbeef\n", &files);
        assert_eq!(found, DeviceMemory { free: GIB * 3 / 2, total: 2 * GIB });
    }

    #[test]
    fn this_machine_has_some() {
        let memory = device_memory(&Device::Cpu).unwrap();
        assert!(0 < memory.free && memory.free <= memory.total && memory.total > 64 << 20, "{memory:?}");
    }
}
