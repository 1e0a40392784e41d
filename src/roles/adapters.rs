//! Adapter versions: alias → generations, leases, compare-and-swap publication, rollback.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{AdapterOptions, confined};
use crate::error::{Error, Result};
use crate::model::{Adapter, Decoder};
use crate::telemetry::metrics;
use crate::weights::AdapterFile;

mod disk;

pub(crate) use disk::live_on_disk;
use disk::{JOBS, MAP, entries, read_map, remove_leftovers, unchanged, write_map};

/// Names that are roles.
const RESERVED: [&str; 2] = ["teacher", "reward"];

/// A pinned generation: held for a request's whole life.
#[derive(Clone)]
pub struct Lease {
    /// Alias it was reached by.
    pub alias: String,
    /// Version under that alias.
    pub version: u64,
    /// The weights.
    pub adapter: Arc<Adapter>,
}

/// How a publication treats an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublishMode {
    /// The alias must not exist.
    Create,
    /// Whatever is there is replaced.
    Upsert,
    /// The live generation must be this one; a 409 otherwise.
    CompareAndSwap(String),
}

/// One row of `GET /v1/lora_adapters`.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterCard {
    /// Alias.
    pub alias: String,
    /// Version.
    pub version: u64,
    /// Content hash.
    pub generation: String,
    /// Rank.
    pub rank: usize,
    /// Bytes in memory; 0 when not resident.
    pub bytes: usize,
    /// Whether it is the live one of its alias.
    pub live: bool,
    /// Requests holding it.
    pub active_leases: usize,
    /// Folder on disk.
    pub source: PathBuf,
}

/// What is kept of a version whether it is in memory or not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    generation: String,
    rank: usize,
}

/// One alias as the map file has it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Alias {
    /// `None` after an unload; the entry stays so that numbers are never used again.
    live: Option<u64>,
    /// Number of the next version.
    next: u64,
    versions: BTreeMap<u64, Record>,
}

struct Resident {
    adapter: Arc<Adapter>,
    used: u64,
}

#[derive(Default)]
struct State {
    aliases: BTreeMap<String, Alias>,
    resident: BTreeMap<(String, u64), Resident>,
    clock: u64,
}

/// The adapters of one student base. Every published version is kept on disk under `<root>/<alias>/<version>`; the live
/// ones are recorded in a file replaced atomically, so a restart serves what was live.
pub struct Adapters {
    root: PathBuf,
    max_resident: usize,
    max_rank: usize,
    model: Arc<Decoder>,
    /// Short holds only: requests resolve names under it.
    state: Mutex<State>,
    /// One change at a time, disk included.
    changing: Mutex<()>,
}

impl Adapters {
    /// Opens the root (created if missing) and loads what was live.
    pub(super) fn open(model: Arc<Decoder>, options: &AdapterOptions) -> Result<Self> {
        if options.max_resident == 0 {
            return Err(Error::invalid("adapters.max_resident", "must be at least 1"));
        }
        let at_root =
            |error: std::io::Error| Error::invalid("adapters.path", format!("{}: {error}", options.path.display()));
        std::fs::create_dir_all(&options.path).map_err(at_root)?;
        let root = options.path.canonicalize().map_err(at_root)?;
        let aliases = read_map(&root)?;
        remove_leftovers(&root);
        let adapters = Adapters {
            root,
            max_resident: options.max_resident,
            max_rank: options.max_rank,
            model,
            state: Mutex::new(State { aliases, ..State::default() }),
            changing: Mutex::new(()),
        };
        let live: Vec<(String, u64)> =
            adapters.lock().aliases.iter().filter_map(|(name, alias)| Some((name.clone(), alias.live?))).collect();
        for (alias, version) in live {
            adapters.at(&alias, version).map_err(|error| {
                let advice = format!("give the student its old model, or move {} away", adapters.root.display());
                error.context(format!("adapter `{alias}` version {version} was live but cannot be loaded ({advice})"))
            })?;
            adapters.show_live(&alias, version);
        }
        Ok(adapters)
    }

    /// Folder all adapter paths are confined to.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Most generations kept in memory besides those in use, and the largest rank taken.
    pub fn limits(&self) -> (usize, usize) {
        (self.max_resident, self.max_rank)
    }

    /// Folder for a job's checkpoints; no alias can have its name.
    pub fn job_folder(&self, job: &str) -> PathBuf {
        self.root.join(JOBS).join(job)
    }

    /// The folders of all jobs that have one.
    pub(crate) fn job_folders(&self) -> Vec<PathBuf> {
        entries(&self.root.join(JOBS)).filter(|path| path.is_dir()).collect()
    }

    /// The live generation of an alias; `None` if the alias has none (the base answers for `student` only then).
    pub fn live(&self, alias: &str) -> Option<Lease> {
        let mut state = self.lock();
        let version = state.aliases.get(alias)?.live?;
        state.lease(alias, version)
    }

    /// A pinned version; 404 if it is gone.
    pub fn at(&self, alias: &str, version: u64) -> Result<Lease> {
        let expected = {
            let mut state = self.lock();
            if let Some(lease) = state.lease(alias, version) {
                return Ok(lease);
            }
            let found = state.aliases.get(alias).and_then(|entry| entry.versions.get(&version));
            found.ok_or_else(|| Error::no_model(&format!("{alias}@{version}")))?.generation.clone()
        };
        let folder = self.folder(alias, version);
        let adapter = Arc::new(Adapter::from_file(&AdapterFile::read(&folder)?, &self.model)?);
        unchanged(&folder, &adapter.generation, &expected)?;
        let mut state = self.lock();
        state.keep(alias, version, adapter);
        let lease = state.lease(alias, version).ok_or_else(|| Error::no_model(&format!("{alias}@{version}")));
        self.evict(&mut state);
        lease
    }

    /// Loads a PEFT folder under the root (403 outside it) and makes it live as `alias`.
    pub fn load(&self, alias: &str, path: &str, mode: PublishMode) -> Result<Lease> {
        let result = confined(&self.root, path, "lora_path").and_then(|folder| AdapterFile::read(&folder));
        self.publish(alias, &self.counted(result)?, mode)
    }

    /// The adapter behind a name (`alias`, `alias@<version>`) or a folder under the root, to go on training from.
    pub fn file(&self, name: &str) -> Result<AdapterFile> {
        let (alias, version) = match name.rsplit_once('@') {
            Some((alias, version)) => (alias, version.parse().ok()),
            None => (name, self.lock().aliases.get(name).and_then(|alias| alias.live)),
        };
        let Some(version) = version else { return AdapterFile::read(&confined(&self.root, name, "lora.init_from")?) };
        let record = |entry: &Alias| Some(entry.versions.get(&version)?.generation.clone());
        match self.lock().aliases.get(alias).and_then(record) {
            Some(expected) => {
                let folder = self.folder(alias, version);
                let file = AdapterFile::read(&folder)?;
                unchanged(&folder, &file.generation()?, &expected)?;
                Ok(file)
            }
            // An alias that was taken away leaves its files to the jobs that began with it.
            None => {
                let folder = confined(&self.root, name, "lora.init_from");
                let left = || confined(&self.root, &format!("{alias}/{version}"), "lora.init_from");
                AdapterFile::read(&folder.or_else(|error| left().map_err(|_| error))?)
            }
        }
    }

    /// The name of what `name` stands for now: an alias as `alias@<version>`, `student` without one as its base, anything else as it is.
    pub fn pinned(&self, name: &str) -> String {
        match self.lock().aliases.get(name).and_then(|alias| alias.live) {
            Some(version) => format!("{name}@{version}"),
            None if name == "student" => "student:base".to_owned(),
            None => name.to_owned(),
        }
    }

    /// A copy that answers but is not published, to be looked at first; version 0.
    pub fn stage(&self, alias: &str, file: &AdapterFile) -> Result<Lease> {
        Ok(Lease { alias: alias.to_owned(), version: 0, adapter: self.copy(file)? })
    }

    /// Publishes an adapter from memory: writes it, then swaps the alias. A failure leaves the old one live. An adapter that is
    /// the live one already stays as it is, so that a step done twice makes one version.
    pub fn publish(&self, alias: &str, file: &AdapterFile, mode: PublishMode) -> Result<Lease> {
        let since = Instant::now();
        let result = self.publish_inner(alias, file, mode);
        if check_alias(alias).is_ok() {
            let outcome = if result.is_ok() { "ok" } else { "error" };
            metrics().adapter_swaps_total.with_label_values(&[alias, outcome]).inc();
        }
        metrics().adapter_swap_duration_seconds.observe(since.elapsed().as_secs_f64());
        result
    }

    fn publish_inner(&self, alias: &str, file: &AdapterFile, mode: PublishMode) -> Result<Lease> {
        check_alias(alias)?;
        let adapter = self.counted(self.copy(file))?;
        let _turn = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entry = self.lock().aliases.get(alias).cloned().unwrap_or_default();
        let live = entry.live.and_then(|version| Some((version, entry.versions.get(&version)?.generation.clone())));
        match (&mode, &live) {
            (PublishMode::Create, Some((version, _))) => {
                let message = format!("adapter `{alias}` is there already (version {version})");
                return Err(Error::conflict(message).at("lora_name"));
            }
            (PublishMode::CompareAndSwap(expected), found) => {
                let found = found.as_ref().map_or("none", |(_, generation)| generation);
                if found != expected {
                    let message = format!("adapter `{alias}` is at generation {found}, not at {expected}");
                    return Err(Error::conflict(message).at("expected_generation"));
                }
            }
            _ => {}
        }
        if let Some((version, _)) = live.filter(|(_, generation)| *generation == adapter.generation) {
            return self.at(alias, version);
        }
        let version = entry.next.max(self.next_on_disk(alias)).max(1);
        file.write(&self.folder(alias, version)).map_err(|error| error.context("the adapter is not published"))?;
        entry.next = version + 1;
        entry.live = Some(version);
        let rank = rank_of(&adapter);
        entry.versions.insert(version, Record { generation: adapter.generation.clone(), rank });
        self.swap(alias, entry, Some((version, adapter)))?;
        self.at(alias, version)
    }

    /// Makes version `to` (the previous one if `None`) live again.
    pub fn rollback(&self, alias: &str, to: Option<u64>) -> Result<Lease> {
        let _turn = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entry = self.lock().aliases.get(alias).cloned().ok_or_else(|| Error::no_model(alias))?;
        let live = entry.live.ok_or_else(|| Error::no_model(alias))?;
        let version = match to {
            Some(version) => version,
            None => *entry.versions.range(..live).next_back().map(|(version, _)| version).ok_or_else(|| {
                Error::conflict(format!("adapter `{alias}` has no version before {live}")).at("version")
            })?,
        };
        let lease = self.at(alias, version)?;
        entry.live = Some(version);
        self.swap(alias, entry, Some((version, lease.adapter.clone())))?;
        metrics().adapter_swaps_total.with_label_values(&[alias, "rollback"]).inc();
        Ok(lease)
    }

    /// Takes an alias away; requests that hold it go on. 409 on generation mismatch. The files stay.
    pub fn unload(&self, alias: &str, expected_generation: Option<&str>) -> Result<()> {
        let _turn = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entry = self.lock().aliases.get(alias).cloned().ok_or_else(|| Error::no_model(alias))?;
        let live = entry.live.ok_or_else(|| Error::no_model(alias))?;
        let generation = entry.versions.get(&live).map(|record| record.generation.clone()).unwrap_or_default();
        if expected_generation.is_some_and(|expected| expected != generation) {
            let message = format!("adapter `{alias}` is at generation {generation}");
            return Err(Error::conflict(message).at("expected_generation"));
        }
        entry.live = None;
        entry.versions.clear();
        self.swap(alias, entry, None)
    }

    /// All versions of all aliases.
    pub fn list(&self) -> Vec<AdapterCard> {
        let state = self.lock();
        let mut cards = Vec::new();
        for (name, alias) in &state.aliases {
            let mut held = 0;
            for (version, record) in &alias.versions {
                let resident = state.resident.get(&(name.clone(), *version));
                let active_leases = resident.map_or(0, |one| Arc::strong_count(&one.adapter) - 1);
                held += active_leases;
                cards.push(AdapterCard {
                    alias: name.clone(),
                    version: *version,
                    generation: record.generation.clone(),
                    rank: record.rank,
                    bytes: resident.map_or(0, |one| one.adapter.bytes),
                    live: alias.live == Some(*version),
                    active_leases,
                    source: self.folder(name, *version),
                });
            }
            metrics().adapter_leases.with_label_values(&[name]).set(held as i64);
        }
        cards
    }

    /// Bytes of the generations in memory.
    pub(super) fn resident_bytes(&self) -> usize {
        self.lock().resident.values().map(|one| one.adapter.bytes).sum()
    }

    /// Whether an adapter could be published here; a 422 naming what speaks against it.
    pub(crate) fn check(&self, file: &AdapterFile) -> Result<()> {
        self.copy(file).map(drop)
    }

    fn copy(&self, file: &AdapterFile) -> Result<Arc<Adapter>> {
        let adapter = Adapter::from_file(file, &self.model)?;
        let rank = rank_of(&adapter);
        if rank > self.max_rank {
            let message = format!("rank {rank} is above adapters.max_rank ({})", self.max_rank);
            return Err(Error::unprocessable("r", message));
        }
        Ok(Arc::new(adapter))
    }

    /// Records the alias on disk, then in memory. An error leaves both as they were.
    fn swap(&self, alias: &str, entry: Alias, adapter: Option<(u64, Arc<Adapter>)>) -> Result<()> {
        let mut aliases = self.lock().aliases.clone();
        aliases.insert(alias.to_owned(), entry.clone());
        write_map(&self.root, &aliases)?;
        let mut state = self.lock();
        state.aliases = aliases;
        if let Some((version, adapter)) = adapter {
            state.keep(alias, version, adapter);
        }
        self.evict(&mut state);
        drop(state);
        self.show_live(alias, entry.live.unwrap_or(0));
        Ok(())
    }

    /// Drops generations of aliases that are gone, then the least recently used ones that nobody holds, down to the limit. A
    /// live one stays.
    fn evict(&self, state: &mut State) {
        let State { aliases, resident, .. } = state;
        resident
            .retain(|(alias, version), _| aliases.get(alias).is_some_and(|entry| entry.versions.contains_key(version)));
        while resident.len() > self.max_resident {
            let idle = resident
                .iter()
                .filter(|((alias, version), one)| {
                    Arc::strong_count(&one.adapter) == 1
                        && aliases.get(alias).is_none_or(|entry| entry.live != Some(*version))
                })
                .min_by_key(|(_, one)| one.used)
                .map(|(key, _)| key.clone());
            match idle {
                Some(key) => resident.remove(&key),
                None => break,
            };
        }
        metrics().adapters_resident.set(resident.len() as i64);
        let bytes = resident.values().map(|one| one.adapter.bytes as i64).sum();
        metrics().adapter_resident_bytes.set(bytes);
        metrics().gpu_memory_bytes.with_label_values(&["adapter"]).set(bytes);
    }

    fn folder(&self, alias: &str, version: u64) -> PathBuf {
        self.root.join(alias).join(version.to_string())
    }

    /// One above the highest number a folder has: a version written just before a crash keeps its number.
    fn next_on_disk(&self, alias: &str) -> u64 {
        let number = |path: PathBuf| path.file_name()?.to_str()?.parse::<u64>().ok();
        entries(&self.root.join(alias)).filter_map(number).max().map_or(1, |last| last + 1)
    }

    fn show_live(&self, alias: &str, version: u64) {
        metrics().adapter_active_version.with_label_values(&[alias]).set(version as i64);
    }

    fn counted<T>(&self, result: Result<T>) -> Result<T> {
        result.inspect_err(|error| {
            let reason = match error.status() {
                403 => "forbidden",
                404 => "missing",
                422 => "unusable",
                _ => "other",
            };
            metrics().adapter_load_failures_total.with_label_values(&[reason]).inc();
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn lease(&mut self, alias: &str, version: u64) -> Option<Lease> {
        self.clock += 1;
        let one = self.resident.get_mut(&(alias.to_owned(), version))?;
        one.used = self.clock;
        Some(Lease { alias: alias.to_owned(), version, adapter: one.adapter.clone() })
    }

    fn keep(&mut self, alias: &str, version: u64, adapter: Arc<Adapter>) {
        self.clock += 1;
        let used = self.clock;
        // A generation that is there already keeps its Arc, so that its leases stay counted.
        self.resident.entry((alias.to_owned(), version)).or_insert(Resident { adapter, used }).used = used;
    }
}

fn rank_of(adapter: &Adapter) -> usize {
    adapter.config.rank_pattern.values().copied().chain([adapter.config.r]).max().unwrap_or(adapter.config.r)
}

/// An alias is a folder name and a model name.
fn check_alias(alias: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let good = alias.starts_with(|c: char| c.is_ascii_alphanumeric()) && alias.chars().all(plain) && alias.len() <= 64;
    if !good {
        let message = format!("`{alias}` is no adapter name: letters, digits, `.`, `_`, `-`, at most 64 of them");
        return Err(Error::invalid("lora_name", message));
    }
    if RESERVED.contains(&alias) || alias == MAP {
        return Err(Error::invalid("lora_name", format!("`{alias}` is taken by the server; choose another name")));
    }
    Ok(())
}
