//! Rules of the house as tests: which module may use which, file sizes, module docs, where `unsafe` may stand.

use std::fs;
use std::path::{Path, PathBuf};

/// What each module may use by `crate::…`, beside itself; `cores`, `error`, `seed`, `size`, `telemetry` and option types are free to all.
const EDGES: &[(&str, &[&str])] = &[
    ("kernels", &[]),
    ("ops", &["kernels"]),
    ("weights", &[]),
    ("text", &[]),
    ("jobs", &[]),
    ("model", &["ops", "weights"]),
    ("engine", &["model", "text"]),
    ("train", &["model", "ops", "text", "weights"]),
    ("roles", &["engine", "model", "weights", "text"]),
    ("rdpo", &["roles", "engine", "train", "jobs", "text"]),
    ("server", &["roles", "engine", "rdpo", "jobs", "text", "config"]),
];
const MOST_LINES: usize = 600;

fn sources() -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&root.join("src"), &mut paths);
    paths.sort();
    assert!(paths.len() > 30, "the walk lost the sources");
    let name = |path: &PathBuf| path.strip_prefix(root.join("src")).unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// The text before the unit tests, without comments.
fn code(text: &str) -> String {
    let end = text.find("mod tests {").unwrap_or(text.len());
    let lines = text[..end].lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

fn starts_upper(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase())
}

fn report(faults: Vec<String>) {
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn modules_use_only_what_the_table_allows() {
    let mut faults = Vec::new();
    for (name, text) in sources() {
        let room = name.split(['/', '.']).next().unwrap();
        let Some((_, allowed)) = EDGES.iter().find(|(module, _)| *module == room) else { continue };
        for line in code(&text).lines() {
            for (at, _) in line.match_indices("crate::") {
                let rest = &line[at + "crate::".len()..];
                let used: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let free = used == room
                    || used.is_empty()
                    || ["cores", "error", "seed", "size", "telemetry"].contains(&used.as_str());
                // Option types are free, but only where nothing else is taken along.
                let names: Vec<&str> =
                    rest.split(|c: char| !c.is_alphanumeric()).filter(|name| starts_upper(name)).collect();
                let only_options = !names.is_empty() && names.iter().all(|name| name.ends_with("Options"));
                assert!(!rest.starts_with('{'), "src/{name}: one `use crate::…` for each module: {line}");
                if !free && !allowed.contains(&used.as_str()) && !only_options {
                    faults.push(format!("src/{name}: {room} may not use {used}: {}", line.trim()));
                }
            }
        }
    }
    report(faults);
}

#[test]
fn files_are_documented_and_short() {
    let mut faults = Vec::new();
    for (name, text) in sources() {
        if !text.starts_with("//!") {
            faults.push(format!("src/{name} does not say what it is (`//!` on its first line)"));
        }
        if text.lines().count() > MOST_LINES {
            faults.push(format!("src/{name} has {} lines, {MOST_LINES} at most", text.lines().count()));
        }
        if name.split(['/', '.']).any(|part| ["utils", "util", "common", "helpers"].contains(&part)) {
            faults.push(format!("src/{name}: a module is named for what it does"));
        }
    }
    report(faults);
}

#[test]
fn unsafe_and_features_stay_in_the_kernels() {
    let mut faults = Vec::new();
    for (name, text) in sources() {
        for line in code(&text).lines() {
            let mapping = name.starts_with("weights/") && line.to_lowercase().contains("mmap");
            if line.contains("unsafe ") && !name.starts_with("kernels/") && !mapping {
                faults.push(format!("src/{name}: unsafe outside kernels: {}", line.trim()));
            }
            let feature = line.contains("cfg") && line.contains("feature =") && !line.contains("target_feature");
            if feature && !name.starts_with("kernels/") && name != "roles/mistral.rs" {
                faults.push(format!("src/{name}: a feature outside kernels: {}", line.trim()));
            }
        }
    }
    report(faults);
}

#[test]
fn nothing_is_left_undone() {
    let mut faults = Vec::new();
    for (name, text) in sources() {
        for mark in ["dbg!(", "todo!(", "unimplemented!("] {
            if code(&text).contains(mark) {
                faults.push(format!("src/{name}: {mark}…)"));
            }
        }
    }
    report(faults);
}

#[test]
fn the_licence_is_there() {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("LICENSE")).unwrap();
    assert!(text.contains("Apache License") && text.contains("Version 2.0"));
}
