//! Opens checkpoints once, picks the device and the dtype; when all are in memory, starts one engine per checkpoint.

use std::path::PathBuf;
use std::sync::Arc;

use candle_core::Device;

use super::plan::{MemoryPlan, Room, Wishes};
use super::{Backend, DeviceOptions, Mistral, ModelOptions, Remote, Role, RoleOptions, RolesOptions};
use crate::engine::{Engine, EngineOptions, Gate};
use crate::error::{Code, Error, Result};
use crate::model::{Decoder, LoadOptions, WeightFormat, gpu};
use crate::telemetry::metrics;
use crate::text::Tokenizer;
use crate::weights::{Checkpoint, GenerationDefaults};

/// One checkpoint in memory with its engine; every role that names it shares this.
pub(super) struct Loaded {
    /// Name under `[models]` it was first loaded by.
    pub(super) name: String,
    /// Canonical path.
    pub(super) path: PathBuf,
    /// Dtype of the linear weights.
    pub(super) weights: WeightFormat,
    /// What the file stores.
    pub(super) stored: String,
    pub(super) engine: Engine,
    pub(super) defaults: GenerationDefaults,
    bytes: i64,
}

impl Drop for Loaded {
    fn drop(&mut self) {
        metrics().gpu_memory_bytes.with_label_values(&["weights"]).sub(self.bytes);
    }
}

/// What a role's model is.
pub(super) enum Backing {
    Native(Arc<Loaded>),
    Mistral(Arc<Mistral>),
    Remote(Arc<Remote>),
}

/// What a role's model is while models are loaded.
pub(super) enum Found {
    /// Number of the checkpoint.
    Native(usize),
    Mistral(Arc<Mistral>),
    Remote(Arc<Remote>),
}

impl Found {
    pub(super) fn backing(self, loaded: &[Arc<Loaded>]) -> Backing {
        match self {
            Found::Native(number) => Backing::Native(loaded[number].clone()),
            Found::Mistral(mistral) => Backing::Mistral(mistral),
            Found::Remote(remote) => Backing::Remote(remote),
        }
    }
}

/// A checkpoint in memory whose engine is yet to come: how large its cache may be is known when all of them are here.
struct Opened {
    name: String,
    path: PathBuf,
    weights: WeightFormat,
    stored: String,
    max_model_len: Option<usize>,
    model: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    defaults: GenerationDefaults,
}

/// Loads checkpoints, each once.
pub(super) struct Loader<'a> {
    options: &'a RolesOptions,
    device: Device,
    room: Room,
    opened: Vec<Opened>,
    mistral: Vec<Arc<Mistral>>,
}

impl<'a> Loader<'a> {
    pub(super) fn new(options: &'a RolesOptions) -> Result<Self> {
        if !(options.training_share > 0.0 && options.training_share <= 1.0) {
            return Err(Error::invalid(
                "training.device_share",
                format!("must be in (0, 1], not {}", options.training_share),
            ));
        }
        let device = device(&options.device)?;
        let room = Room::measure(&device, &options.device)?;
        Ok(Loader { options, device, room, opened: Vec::new(), mistral: Vec::new() })
    }

    /// The role's checkpoint, or its endpoints.
    pub(super) fn find(&mut self, role: Role, options: &RoleOptions) -> Result<Found> {
        match options.backend {
            Backend::Native => self.get(role.name(), &options.model).map(Found::Native),
            Backend::Mistralrs => self.get_mistral(role, &options.model).map(Found::Mistral),
            Backend::Remote => Remote::new(role, options).map(Found::Remote),
        }
    }

    /// What `[models.NAME]` says, and the path on disk.
    fn settings(&self, role: &str, name: &str) -> Result<(&'a ModelOptions, PathBuf)> {
        let model = self.options.models.get(name).ok_or_else(|| {
            let known = self.options.models.keys().cloned().collect::<Vec<_>>().join(", ");
            Error::invalid(format!("roles.{role}.model"), format!("there is no [models.{name}]; there is: {known}"))
        })?;
        let field = |key: &str| format!("models.{name}.{key}");
        if !model.path.exists() {
            let advice = match model.path.file_name() {
                Some(folder) if model.path.extension().is_none() => {
                    format!("; run `models/fetch.sh {}` or set the path", folder.to_string_lossy())
                }
                _ => "; set the path".to_owned(),
            };
            return Err(Error::invalid(
                field("path"),
                format!("there is no model at {}{advice}", model.path.display()),
            ));
        }
        let canonical = model.path.canonicalize().map_err(|error| Error::invalid(field("path"), format!("{error}")))?;
        Ok((model, canonical))
    }

    /// Number of the checkpoint `role` names; loaded unless another role has it already (same canonical path and format).
    pub(super) fn get(&mut self, role: &str, name: &str) -> Result<usize> {
        let (model, path) = self.settings(role, name)?;
        let weights = model.dtype.parse::<WeightFormat>().map_err(|error| error.at(format!("models.{name}.dtype")))?;
        let checkpoint = Checkpoint::open(&path)?;
        let same = |one: &Opened| one.path == *checkpoint.path() && one.weights == weights;
        if let Some(number) = self.opened.iter().position(same) {
            same_context(name, model, &self.opened[number].name, self.opened[number].max_model_len)?;
            return Ok(number);
        }
        let load = LoadOptions { device: self.device.clone(), weights };
        let decoder = Decoder::load(&checkpoint, &load).map_err(|error| match error.code {
            Code::OutOfMemory => {
                let text =
                    "its weights do not fit into the device's memory: choose a narrower dtype or a smaller model";
                Error::invalid(format!("models.{name}.dtype"), text)
            }
            _ => error,
        })?;
        self.opened.push(Opened {
            name: name.to_owned(),
            path: checkpoint.path().clone(),
            weights,
            stored: checkpoint.stored_dtype(),
            max_model_len: model.max_model_len,
            model: Arc::new(decoder),
            tokenizer: tokenizer(&checkpoint)?,
            defaults: checkpoint.generation_defaults(),
        });
        Ok(self.opened.len() - 1)
    }

    /// The same in mistral.rs.
    fn get_mistral(&mut self, role: Role, name: &str) -> Result<Arc<Mistral>> {
        let (model, path) = self.settings(role.name(), name)?;
        let checkpoint = Checkpoint::open_any(&path)?;
        let same = |one: &&Arc<Mistral>| one.path == *checkpoint.path() && one.dtype == model.dtype;
        if let Some(found) = self.mistral.iter().find(same) {
            same_context(name, model, &found.name, found.longest)?;
            return Ok(found.clone());
        }
        let loaded = Mistral::load(role, name, model, &checkpoint, self.options, &self.room)?;
        self.mistral.push(loaded.clone());
        Ok(loaded)
    }

    /// Divides the memory and starts an engine for each checkpoint, in the order of their numbers; `student` is the student's number.
    pub(super) fn start(self, student: usize) -> Result<(Vec<Arc<Loaded>>, MemoryPlan)> {
        let Loader { options, device, room, opened, .. } = self;
        let cache = &options.kv_cache;
        let engine_options = |one: &Opened| EngineOptions {
            name: one.name.clone(),
            block_size: cache.block_size,
            kv_memory_bytes: 0,
            max_batch_tokens: cache.max_batch_tokens,
            max_sequences: cache.max_sequences,
            max_waiting: cache.max_waiting,
            max_model_len: one.max_model_len,
            prefix_caching: cache.prefix_caching,
            speculative: options.speculative_config.clone(),
        };
        let mut engines: Vec<EngineOptions> = opened.iter().map(engine_options).collect();
        let mut models: Vec<_> = opened.iter().map(|one| &*one.model).zip(&mut engines).collect();
        let wishes = Wishes { kv_cache: cache, adapters: &options.adapters };
        let plan = MemoryPlan::divide(room, &mut models, &opened[student].model, &wishes)?;
        let share = options.training_share;
        let gate = Arc::new(if device.is_cpu() { Gate::on_cores(share) } else { Gate::new(share) });
        let start = |(one, options): (Opened, EngineOptions)| -> Result<Arc<Loaded>> {
            let held = one.model.bytes() as i64;
            let engine = Engine::start(one.model, one.tokenizer, gate.clone(), options)?;
            metrics().gpu_memory_bytes.with_label_values(&["weights"]).add(held);
            Ok(Arc::new(Loaded {
                name: one.name,
                path: one.path,
                weights: one.weights,
                stored: one.stored,
                engine,
                defaults: one.defaults,
                bytes: held,
            }))
        };
        Ok((opened.into_iter().zip(engines).map(start).collect::<Result<_>>()?, plan))
    }
}

/// Two names of one checkpoint in memory have to agree on its context.
fn same_context(name: &str, model: &ModelOptions, other: &str, longest: Option<usize>) -> Result<()> {
    if model.max_model_len == longest {
        return Ok(());
    }
    let text = format!("`{other}` is the same checkpoint with another max_model_len; make them equal");
    Err(Error::invalid(format!("models.{name}.max_model_len"), text))
}

/// The checkpoint's tokenizer.
pub(super) fn tokenizer(checkpoint: &Checkpoint) -> Result<Arc<Tokenizer>> {
    Ok(Arc::new(Tokenizer::new(checkpoint.tokenizer()?)?))
}

fn device(options: &DeviceOptions) -> Result<Device> {
    if let Some(threads) = options.threads {
        if threads == 0 {
            return Err(Error::invalid("device.threads", "must be at least 1"));
        }
        // Err: the pool is running already (a second load in one process); it keeps its size.
        if rayon::ThreadPoolBuilder::new().num_threads(threads).build_global().is_err() {
            tracing::debug!(threads, "the thread pool is running already and keeps its size");
        }
    }
    let cuda = |ordinal: usize| {
        if !candle_core::utils::cuda_is_available() {
            return Err(Error::invalid(
                "device.kind",
                "this build has no CUDA; build with `--features cuda`, or set `auto` or `cpu`",
            ));
        }
        gpu(ordinal).map_err(|error| Error::invalid("device.kind", format!("cuda:{ordinal}: {error}")))
    };
    match options.kind.as_str() {
        "cpu" => Ok(Device::Cpu),
        "auto" if candle_core::utils::cuda_is_available() => Ok(gpu(0).unwrap_or_else(|error| {
            tracing::warn!(%error, "no CUDA device answers; running on the CPU");
            Device::Cpu
        })),
        "auto" => Ok(Device::Cpu),
        "cuda" => cuda(0),
        other => match other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()) {
            Some(ordinal) => cuda(ordinal),
            None => Err(Error::invalid("device.kind", format!("`{other}` is not `auto`, `cpu`, `cuda` or `cuda:N`"))),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_when_wrong() {
        let error = device(&DeviceOptions { kind: "gpu".into(), ..DeviceOptions::default() }).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("device.kind"));
    }
}
