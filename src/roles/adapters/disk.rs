//! What the adapters' root holds on disk: the map of what is live, and what killed processes left.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::Alias;
use crate::error::{Error, Result};

/// File that says what is live.
pub(super) const MAP: &str = "live.json";
/// What jobs keep; no alias can have its name.
pub(super) const JOBS: &str = ".jobs";

/// A 422 where a published version is another than it was.
pub(super) fn unchanged(folder: &Path, generation: &str, expected: &str) -> Result<()> {
    if generation == expected {
        return Ok(());
    }
    let message = format!("{} was changed on disk after it was published", folder.display());
    Err(Error::unprocessable("adapter_model.safetensors", message))
}

pub(super) fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// What was being written when a process was killed. Nothing takes an hour to write.
pub(super) fn remove_leftovers(root: &Path) {
    let is_old = |path: &Path| {
        let age = path.metadata().and_then(|data| data.modified()).ok().and_then(|at| at.elapsed().ok());
        age.is_some_and(|age| age.as_secs() > 3600)
    };
    let folders = entries(root).chain(entries(&root.join(JOBS)));
    let inner = folders.flat_map(|folder| entries(&folder).collect::<Vec<_>>());
    for path in entries(root).chain(inner).filter(|path| is_old(path)) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let removed = match path.is_dir() {
            true if name.starts_with(".adapter-") => std::fs::remove_dir_all(&path),
            false if name.starts_with(".tmp") => std::fs::remove_file(&path),
            _ => Ok(()),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "{} stays behind", path.display());
        }
    }
}

pub(super) fn read_map(root: &Path) -> Result<BTreeMap<String, Alias>> {
    let path = root.join(MAP);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| {
            Error::unprocessable("adapters.path", format!("{} is not readable: {error}", path.display()))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(Error::internal(format!("{}: {error}", path.display())).at("adapters.path")),
    }
}

/// The live version of an alias as a server has left it under this root.
pub(crate) fn live_on_disk(root: &Path, alias: &str) -> Result<Option<u64>> {
    Ok(read_map(root)?.get(alias).and_then(|alias| alias.live))
}

pub(super) fn write_map(root: &Path, aliases: &BTreeMap<String, Alias>) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(root)?;
        serde_json::to_writer_pretty(&mut file, aliases)?;
        file.flush()?;
        file.as_file().sync_all()?;
        file.persist(root.join(MAP)).map_err(|error| error.error)?;
        std::fs::File::open(root)?.sync_all()
    };
    write().map_err(|error| {
        Error::internal(format!("cannot record what is live in {}: {error}", root.join(MAP).display()))
            .at("adapters.path")
    })
}
