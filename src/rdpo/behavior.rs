//! Behaviours: named recipes of a principle, a critique request, a revision request and a judge's rubric.

use std::path::Path;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::{Error, Result};
use crate::roles::{Rubric, fill};

/// A recipe; the built-in ones are TOML files of this shape.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Behavior {
    /// Its name.
    pub name: String,
    /// What a good answer is, in one or two sentences.
    pub principle: String,
    /// Adversarial context put before the prompt (a persona, say).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<String>,
    /// Whether training prompts carry the context too: the student must resist it.
    #[serde(default)]
    pub train_with_context: bool,
    /// Asks the teacher what is wrong with its answer; `{principle}` and `{prompt}` (the last user turn) are filled in.
    pub critique: String,
    /// Asks for the improved answer, with the same places.
    pub revision: String,
    /// How the judge is asked.
    pub judge: Rubric,
}

const BUILT_IN: [&str; 3] = [
    include_str!("behaviors/safety.toml"),
    include_str!("behaviors/role_play_robustness.toml"),
    include_str!("behaviors/sycophancy.toml"),
];

impl Behavior {
    /// Checks that nothing is empty and the rubric can be used; `prefix` is put before field names.
    pub fn validate(&self, prefix: &str) -> Result<()> {
        let texts = [
            ("name", &self.name),
            ("principle", &self.principle),
            ("critique", &self.critique),
            ("revision", &self.revision),
        ];
        for (key, text) in texts {
            if text.trim().is_empty() {
                return Err(Error::invalid(format!("{prefix}.{key}"), "must not be empty"));
            }
        }
        if self.context.as_ref().is_some_and(|context| context.trim().is_empty()) {
            return Err(Error::invalid(format!("{prefix}.context"), "must not be empty; leave it out instead"));
        }
        if self.train_with_context && self.context.is_none() {
            return Err(Error::invalid(format!("{prefix}.train_with_context"), "there is no context to train with"));
        }
        self.judge.validate(&format!("{prefix}.judge"))
    }

    /// The critique request about the answer to `prompt`.
    pub fn critique_request(&self, prompt: &str) -> String {
        fill(&self.critique, &[("principle", &self.principle), ("prompt", prompt)])
    }

    /// The revision request for `prompt`.
    pub fn revision_request(&self, prompt: &str) -> String {
        fill(&self.revision, &[("principle", &self.principle), ("prompt", prompt)])
    }

    fn from_toml(text: &str, source: &str) -> Result<Self> {
        let behavior: Behavior =
            toml::from_str(text).map_err(|error| Error::unprocessable(source, format!("{source}: {error}")))?;
        behavior.validate("behavior").map_err(|error| error.context(source))?;
        Ok(behavior)
    }
}

/// The built-in behaviours: `safety`, `role_play_robustness`, `sycophancy`.
pub fn behaviors() -> Result<Vec<Behavior>> {
    BUILT_IN.iter().map(|text| Behavior::from_toml(text, "built-in behavior")).collect()
}

/// The built-in behaviours and the user's own `*.toml` files in `folder` (which may be missing), sorted by file name; a file
/// of the same behaviour name replaces a built-in one.
pub fn behaviors_with(folder: &Path) -> Result<Vec<Behavior>> {
    let mut found = behaviors()?;
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .collect();
    files.sort();
    for path in files {
        let source = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::unprocessable(source.clone(), format!("{source}: {error}")))?;
        let behavior = Behavior::from_toml(&text, &source)?;
        found.retain(|one| one.name != behavior.name);
        found.push(behavior);
    }
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn built_in_recipes_are_whole() {
        let all = behaviors().unwrap();
        let names: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["safety", "role_play_robustness", "sycophancy"]);
        for one in &all {
            assert!(one.critique_request("Why?").contains(&one.principle), "{}", one.name);
            assert!(one.revision_request("Why {principle}?").contains("Why {principle}?"), "{}", one.name);
            let rubric_end = one.judge.prompt.find("{prompt}").unwrap();
            assert!(rubric_end > 100, "the rubric comes first, so that the prefix cache has it: {}", one.name);
        }
        assert!(all[1].train_with_context && all[1].context.is_some());
    }

    #[test]
    fn a_users_file_replaces_and_adds() {
        let folder = tempfile::tempdir().unwrap();
        let text = BUILT_IN[0].replace("A good answer", "A calm answer");
        std::fs::write(folder.path().join("mine.toml"), text).unwrap();
        let all = behaviors_with(folder.path()).unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.last().unwrap().principle.starts_with("A calm answer"));
        std::fs::write(folder.path().join("bad.toml"), "name = 1").unwrap();
        assert!(behaviors_with(folder.path()).unwrap_err().message.contains("bad.toml"));
        assert_eq!(behaviors_with(&folder.path().join("none")).unwrap().len(), 3);
    }
}
