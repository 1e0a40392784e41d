//! `rdpo export`: copies an adapter's PEFT files out of the adapter root, with or without a server.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{Client, Remote, client};
use crate::error::{Error, Result};

/// Arguments of `rdpo export`.
#[derive(Args)]
pub(super) struct ExportArgs {
    #[command(flatten)]
    remote: Remote,
    /// Adapter: `student` (the live version), `student@3`, or any alias
    adapter: String,
    /// Folder to write; must not exist
    #[arg(long, short)]
    out: PathBuf,
    /// Adapter root to read from when no server runs
    #[arg(long, default_value = "data/adapters")]
    root: PathBuf,
}

/// Runs the command.
pub(super) async fn export(args: &ExportArgs) -> Result<()> {
    let (alias, version) = parse(&args.adapter)?;
    if args.out.exists() {
        return Err(Error::conflict(format!("{} exists; name a new folder", args.out.display())).at("--out"));
    }
    let source = match Client::new(&args.remote)?.get("/v1/lora_adapters").await {
        Ok(list) => {
            let wanted = |card: &&serde_json::Value| {
                card["alias"].as_str().or(card["lora_name"].as_str()) == Some(alias)
                    && match version {
                        Some(version) => card["version"].as_u64() == Some(version),
                        None => card["live"] == true,
                    }
            };
            let card = list["data"].as_array().into_iter().flatten().find(wanted);
            let path = card.and_then(|card| card["source"].as_str()).map(PathBuf::from);
            path.ok_or_else(|| Error::no_model(&args.adapter))?
        }
        Err(error) if client::is_unreachable(&error) => on_disk(&args.root, alias, version)?,
        Err(error) => return Err(error),
    };
    let files = copy(&source, &args.out)?;
    println!("{} → {} ({files} files, PEFT format)", source.display(), args.out.display());
    Ok(())
}

fn parse(adapter: &str) -> Result<(&str, Option<u64>)> {
    let (alias, version) = match adapter.split_once('@') {
        None => (adapter, None),
        Some((alias, version)) => {
            let version = version.parse().map_err(|_| {
                Error::invalid("adapter", format!("`{version}` is no version number; write e.g. student@3"))
            })?;
            (alias, Some(version))
        }
    };
    if alias.is_empty() || alias.split(['/', '\\']).any(|part| part == "..") {
        return Err(Error::invalid("adapter", format!("`{adapter}` is no adapter name")));
    }
    Ok((alias, version))
}

/// The version asked for, else the one that was live when the server stopped, else the newest.
fn on_disk(root: &Path, alias: &str, version: Option<u64>) -> Result<PathBuf> {
    let folder = root.join(alias);
    let entries = std::fs::read_dir(&folder).map_err(|error| {
        Error::not_found(format!("no server runs and {} cannot be read: {error}", folder.display())).at("--root")
    })?;
    let versions = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u64>().ok());
    let live = crate::roles::live_on_disk(root, alias)?;
    let wanted = version.or(live);
    let found = versions.filter(|found| wanted.is_none_or(|wanted| wanted == *found)).max();
    let found = found.ok_or_else(|| Error::not_found(format!("{} has no such version", folder.display())))?;
    if version.is_none() {
        let which = if live.is_some() { "that was live" } else { "that is newest" };
        eprintln!("no server runs: taking the version {which}, {found}");
    }
    Ok(folder.join(found.to_string()))
}

fn copy(source: &Path, out: &Path) -> Result<usize> {
    let doing =
        |error: std::io::Error| Error::internal(format!("cannot copy to {}: {error}", out.display())).at("--out");
    let entries = std::fs::read_dir(source)
        .map_err(|error| Error::not_found(format!("cannot read {}: {error}", source.display())))?;
    std::fs::create_dir_all(out).map_err(doing)?;
    let mut files = 0;
    for entry in entries {
        let entry = entry.map_err(doing)?;
        if entry.file_type().map_err(doing)?.is_file() {
            std::fs::copy(entry.path(), out.join(entry.file_name())).map_err(doing)?;
            files += 1;
        }
    }
    if files == 0 {
        return Err(Error::not_found(format!("{} is empty", source.display())));
    }
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn copies_the_live_or_the_newest_version_without_a_server() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["2", "10"] {
            let path = folder.path().join("root/student").join(version);
            std::fs::create_dir_all(&path).unwrap();
            std::fs::write(path.join("adapter_config.json"), version).unwrap();
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let args = |adapter: &str, out: &str| ExportArgs {
            remote: Remote { url: format!("http://127.0.0.1:{port}"), api_key: None },
            adapter: adapter.into(),
            out: folder.path().join(out),
            root: folder.path().join("root"),
        };
        export(&args("student", "a")).await.unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("a/adapter_config.json")).unwrap(), "10");
        let live = r#"{"student": {"live": 2, "next": 11, "versions": {}}}"#;
        std::fs::write(folder.path().join("root/live.json"), live).unwrap();
        export(&args("student", "d")).await.unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("d/adapter_config.json")).unwrap(), "2");
        export(&args("student@2", "b")).await.unwrap();
        assert_eq!(std::fs::read_to_string(folder.path().join("b/adapter_config.json")).unwrap(), "2");
        assert_eq!(export(&args("student@2", "b")).await.unwrap_err().status(), 409);
        assert_eq!(export(&args("student@3", "c")).await.unwrap_err().status(), 404);
        assert_eq!(export(&args("student@x", "c")).await.unwrap_err().status(), 400);
        assert_eq!(export(&args("../student", "c")).await.unwrap_err().status(), 400);
    }
}
