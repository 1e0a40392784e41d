//! Adapter versions: alias → generations, leases, compare-and-swap publication, rollback.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::model::Adapter;
use crate::weights::AdapterFile;

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

/// The adapters of one student base. Every published version is kept on disk under `<root>/<alias>/<version>`; the live
/// ones are recorded in a file replaced atomically, so a restart serves what was live.
pub struct Adapters {}

impl Adapters {
    /// Folder all adapter paths are confined to.
    pub fn root(&self) -> &Path {
        todo!()
    }

    /// The live generation of an alias; `None` if the alias has none (the base answers for `student` only then).
    pub fn live(&self, _alias: &str) -> Option<Lease> {
        todo!()
    }

    /// A pinned version; 404 if it is gone.
    pub fn at(&self, _alias: &str, _version: u64) -> Result<Lease> {
        todo!()
    }

    /// Loads a PEFT folder under the root (403 outside it) and makes it live as `alias`.
    pub fn load(&self, _alias: &str, _path: &str, _mode: PublishMode) -> Result<Lease> {
        todo!()
    }

    /// Publishes an adapter from memory: writes it, then swaps the alias. A failure leaves the old one live.
    pub fn publish(&self, _alias: &str, _file: &AdapterFile, _mode: PublishMode) -> Result<Lease> {
        todo!()
    }

    /// Makes version `to` (the previous one if `None`) live again.
    pub fn rollback(&self, _alias: &str, _to: Option<u64>) -> Result<Lease> {
        todo!()
    }

    /// Takes an alias away; requests that hold it go on. 409 on generation mismatch.
    pub fn unload(&self, _alias: &str, _expected_generation: Option<&str>) -> Result<()> {
        todo!()
    }

    /// All versions of all aliases.
    pub fn list(&self) -> Vec<AdapterCard> {
        todo!()
    }
}
