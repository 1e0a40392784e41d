//! Durable state of a run: `FOLDER/checkpoint-STEP/` with the adapter as PEFT has it, AdamW's moments and `state.json`.
//!
//! A checkpoint is written into a folder of another name, synced and renamed; a reader sees a whole one or none.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize, Serializer};
use sha2::{Digest, Sha256};

use super::metrics::StepMetrics;
use super::{EvalMetrics, TrainJob};
use crate::error::{Error, Result};
use crate::telemetry::metrics;
use crate::weights::{AdapterFile, hex};

const PREFIX: &str = "checkpoint-";
const UNFINISHED: &str = ".unfinished-";
/// Form of `state.json`.
const VERSION: u32 = 1;

/// `state.json`: the cursor and what would be dear to compute again. Shuffling and dropout are functions of the job's seed and
/// `step`, so the random state is those two numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedState {
    version: u32,
    /// What job this is a state of; holds the seed.
    pub(crate) fingerprint: String,
    /// Optimizer steps done: also the place in the epoch.
    pub(crate) step: usize,
    /// Steps that changed the weights.
    pub(crate) updates: usize,
    /// Steps in a row that were not finite.
    pub(crate) nonfinite_in_a_row: usize,
    /// Steps that were not finite.
    pub(crate) nonfinite_steps: usize,
    /// Tokens trained on, as TRL counts them.
    pub(crate) num_tokens: usize,
    /// Of those, not computed thanks to shared prompts.
    pub(crate) tokens_saved: usize,
    /// Reference log-probs of each pair's answers, once known.
    #[serde(serialize_with = "known")]
    pub(crate) reference: Vec<Option<[f64; 2]>>,
    /// The same of the held-out pairs.
    #[serde(serialize_with = "known")]
    pub(crate) eval_reference: Vec<Option<[f64; 2]>>,
    /// Every evaluation so far.
    pub(crate) evaluations: Vec<EvalMetrics>,
    /// Metrics of every step so far.
    pub(crate) history: Vec<StepMetrics>,
}

/// A reference that is not finite is not known when the state is read back: JSON has no number for it.
fn known<S: Serializer>(reference: &[Option<[f64; 2]>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(reference.iter().map(|pair| pair.filter(|pair| pair.iter().all(|one| one.is_finite()))))
}

impl SavedState {
    /// The state before the first step.
    pub(crate) fn new(fingerprint: String, pairs: usize, eval_pairs: usize) -> Self {
        SavedState {
            version: VERSION,
            fingerprint,
            step: 0,
            updates: 0,
            nonfinite_in_a_row: 0,
            nonfinite_steps: 0,
            num_tokens: 0,
            tokens_saved: 0,
            reference: vec![None; pairs],
            eval_reference: vec![None; eval_pairs],
            evaluations: Vec::new(),
            history: Vec::new(),
        }
    }
}

/// A checkpoint read back.
pub(crate) struct Saved {
    pub(crate) adapter: AdapterFile,
    pub(crate) moments: HashMap<String, Tensor>,
    pub(crate) state: SavedState,
}

/// SHA-256 over everything that decides the run's result, checkpoint spacing left out.
pub(crate) fn fingerprint(job: &TrainJob<'_>) -> Result<String> {
    let mut hash = Sha256::new();
    let mut options = job.options.clone();
    options.checkpoint_steps = 1;
    hash.update(job.model.identity());
    hash.update(serde_json::to_vec(&(&job.lora, &job.loss, &options, job.seed))?);
    if let Some(init) = &job.init {
        hash.update(init.generation()?);
    }
    hash.update((job.pairs.len() as u64).to_le_bytes());
    for pair in job.pairs.iter().chain(job.eval_pairs) {
        for ids in [&pair.prompt, &pair.chosen, &pair.rejected] {
            hash.update((ids.len() as u64).to_le_bytes());
            ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
        }
        hash.update(pair.score_chosen.to_le_bytes());
        hash.update(pair.score_rejected.to_le_bytes());
    }
    Ok(hex(hash))
}

/// Writes a checkpoint and removes older ones.
pub(crate) fn save(
    folder: &Path,
    adapter: &AdapterFile,
    moments: &HashMap<String, Tensor>,
    state: &SavedState,
) -> Result<()> {
    let _timer = metrics().train_checkpoint_duration_seconds.start_timer();
    let name = format!("{PREFIX}{:08}", state.step);
    let (aside, target) = (folder.join(format!("{UNFINISHED}{name}")), folder.join(&name));
    let written = write(folder, &aside, &target, adapter, moments, state);
    if let Err(error) = written {
        // Best effort: the reader ignores unfinished folders anyway.
        let _ = fs::remove_dir_all(&aside);
        return Err(error.context(format!("cannot write the checkpoint {}", target.display())));
    }
    for (step, path) in checkpoints(folder)? {
        if step != state.step {
            fs::remove_dir_all(path)?;
        }
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    metrics().train_last_checkpoint_timestamp_seconds.set(now.as_secs_f64());
    Ok(())
}

fn write(
    folder: &Path,
    aside: &Path,
    target: &Path,
    adapter: &AdapterFile,
    moments: &HashMap<String, Tensor>,
    state: &SavedState,
) -> Result<()> {
    fs::create_dir_all(folder)?;
    if aside.exists() {
        fs::remove_dir_all(aside)?;
    }
    adapter.write(aside)?;
    let path = aside.join("moments.safetensors");
    candle_core::safetensors::save(moments, &path)?;
    File::open(&path)?.sync_all()?;
    let mut file = File::create(aside.join("state.json"))?;
    file.write_all(&serde_json::to_vec_pretty(state)?)?;
    file.sync_all()?;
    File::open(aside)?.sync_all()?;
    if target.exists() {
        fs::remove_dir_all(target)?;
    }
    fs::rename(aside, target)?;
    File::open(folder)?.sync_all()?;
    Ok(())
}

/// The newest whole checkpoint in `folder`, if there is one. One of another job is a 409.
pub(crate) fn newest(folder: &Path, fingerprint: &str) -> Result<Option<Saved>> {
    if !folder.exists() {
        return Ok(None);
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED)) {
            fs::remove_dir_all(path)?;
        }
    }
    let Some((_, path)) = checkpoints(folder)?.pop() else { return Ok(None) };
    let broken = |error: Error| {
        Error::unprocessable(path.display().to_string(), format!("the checkpoint cannot be read: {error}"))
    };
    let text = fs::read(path.join("state.json")).map_err(|error| broken(error.into()))?;
    let state: SavedState = serde_json::from_slice(&text).map_err(|error| broken(error.into()))?;
    if state.version != VERSION {
        return Err(Error::conflict(format!(
            "{} is a checkpoint of form {}, and this server writes form {VERSION}; use another folder or remove it.",
            path.display(),
            state.version
        )));
    }
    if state.fingerprint != fingerprint {
        return Err(Error::conflict(format!(
            "{} is a checkpoint of a run with other pairs, options, seed or base weights; use another folder or remove it.",
            path.display()
        )));
    }
    let adapter = AdapterFile::read(&path).map_err(broken)?;
    let moments = candle_core::safetensors::load(path.join("moments.safetensors"), &Device::Cpu)
        .map_err(|error| broken(error.into()))?;
    Ok(Some(Saved { adapter, moments, state }))
}

/// Whole checkpoints by step, oldest first.
fn checkpoints(folder: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix(PREFIX)?.parse().ok());
        if let Some(step) = step {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_state_survives_json_bit_for_bit() {
        let mut state = SavedState::new("f".into(), 3, 0);
        state.reference[1] = Some([-12.345_678_901_234_567, f64::MIN_POSITIVE]);
        state.reference[2] = Some([-1.0, f64::NAN]);
        state.history.push(StepMetrics {
            step: 1,
            loss: f64::NAN,
            rewards_margins: 0.1 + 0.2,
            ..StepMetrics::default()
        });
        let back: SavedState = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(back.reference, [None, state.reference[1], None]);
        assert_eq!(back.history[0].rewards_margins, 0.1 + 0.2);
        assert!(back.history[0].loss.is_nan());
    }

    #[test]
    fn the_newest_whole_checkpoint_is_found() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["checkpoint-00000002", "checkpoint-00000010", ".unfinished-checkpoint-00000011", "other"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        let found: Vec<usize> = checkpoints(folder.path()).unwrap().into_iter().map(|(step, _)| step).collect();
        assert_eq!(found, [2, 10]);
        let error = newest(folder.path(), "f").err().unwrap();
        assert_eq!(error.status(), 422, "a checkpoint without state.json is broken, not absent");
        assert!(!folder.path().join(".unfinished-checkpoint-00000011").exists());
        assert!(newest(&folder.path().join("absent"), "f").unwrap().is_none());
    }
}
