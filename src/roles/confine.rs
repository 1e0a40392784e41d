//! Paths from requests stay under their root.

use std::path::{Component, Path, PathBuf};

use crate::error::{Code, Error, Result};

/// The canonical path of `path` under `root` (relative paths start there). 403 naming `param` when it leads outside, also
/// through `..` or a symbolic link; 404 when it is not there. Nothing outside the root is looked at before it is refused.
pub fn confined(root: &Path, path: &str, param: &str) -> Result<PathBuf> {
    let outside = || {
        let message = format!("`{path}` is outside {}; move it there", root.display());
        Error::new(Code::Forbidden, message).at(param)
    };
    let missing = |error: std::io::Error| {
        Error::not_found(format!("`{path}` is not under {}: {error}", root.display())).at(param)
    };
    let home = root.canonicalize().map_err(missing)?;
    let asked = Path::new(path);
    let relative = match asked.is_absolute() {
        true => asked.strip_prefix(&home).or_else(|_| asked.strip_prefix(root)).map_err(|_| outside())?,
        false => asked,
    };
    let mut depth = 0usize;
    for part in relative.components() {
        match part {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => return Err(outside()),
        }
    }
    let found = home.join(relative).canonicalize().map_err(missing)?;
    if found.starts_with(&home) { Ok(found) } else { Err(outside()) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_inside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).unwrap();
        std::fs::write(folder.path().join("secret"), "x").unwrap();
        std::os::unix::fs::symlink(folder.path().join("secret"), root.join("link")).unwrap();
        let status = |path: &str| confined(&root, path, "lora_path").map_err(|error| error.status());
        assert_eq!(status("a/b").unwrap(), root.canonicalize().unwrap().join("a/b"));
        assert!(status("a/../a/b").is_ok());
        assert!(status(root.join("a").to_str().unwrap()).is_ok());
        for bad in ["../secret", "a/../../secret", "link", "/etc/passwd", "/nowhere/at/all"] {
            assert_eq!(status(bad).unwrap_err(), 403, "{bad}");
        }
        assert_eq!(status("nothing").unwrap_err(), 404);
        assert_eq!(confined(&root, "..", "lora_path").unwrap_err().param.as_deref(), Some("lora_path"));
    }
}
