//! A model that mistral.rs runs in this process. It computes logits and nothing else: tokens, sampling, formats, stops and counts
//! are this server's own, so a role answers alike whatever runs it.

#[cfg(all(feature = "cuda", feature = "mistralrs-cuda"))]
compile_error!("`cuda` and `mistralrs-cuda` do not link together: build two binaries (docs/backends.md)");

#[cfg_attr(not(feature = "mistralrs"), path = "mistral/absent.rs")]
mod runner;

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;

use super::load::tokenizer;
use super::plan::{KV_BYTES, Room};
use super::{ModelOptions, Role, RolesOptions};
use crate::engine::{EventStream, Queue, Request, Task, Writer};
use crate::error::{Code, Error, Result};
use crate::text::Tokenizer;
use crate::weights::{Checkpoint, GenerationDefaults};
use runner::Runner;

/// A checkpoint in mistral.rs; every role that names it shares this.
pub struct Mistral {
    /// Name under `[models]` it was first loaded by.
    pub(super) name: String,
    /// Canonical path.
    pub(super) path: PathBuf,
    /// As in the settings.
    pub(super) dtype: String,
    /// What the file stores.
    pub(super) stored: String,
    pub(super) defaults: GenerationDefaults,
    /// As in the settings.
    pub(super) longest: Option<usize>,
    tokenizer: Arc<Tokenizer>,
    max_model_len: usize,
    queue: Arc<Queue>,
    runner: Runner,
}

/// What mistral.rs is started with.
#[cfg_attr(not(feature = "mistralrs"), allow(dead_code))]
struct Plan {
    /// Who asked for it first.
    role: Role,
    name: String,
    /// A `.gguf` file, or a folder.
    path: PathBuf,
    /// The files with the weights.
    weights: Vec<PathBuf>,
    /// `config.json`; null for a file.
    config: Value,
    /// `auto`, a dtype of floats, or how to quantize when loaded.
    dtype: String,
    /// As in `[device]`.
    device: String,
    /// It gets the tokenizer that this server has, so that both speak of the same tokens.
    tokenizer: Arc<Tokenizer>,
    kv_memory_bytes: usize,
    max_sequences: usize,
    queue: Arc<Queue>,
}

impl Mistral {
    /// Loads the checkpoint and starts mistral.rs on it.
    pub(super) fn load(
        role: Role,
        name: &str,
        model: &ModelOptions,
        checkpoint: &Checkpoint,
        options: &RolesOptions,
        memory: &Room,
    ) -> Result<Arc<Self>> {
        let cache = &options.kv_cache;
        if cache.max_sequences == 0 {
            return Err(Error::invalid("kv_cache.max_sequences", "must be at least 1"));
        }
        let tokenizer = tokenizer(checkpoint)?;
        let queue = Arc::new(Queue::new(cache.max_waiting));
        let (runner, context) = Runner::start(Plan {
            role,
            name: name.to_owned(),
            path: checkpoint.path().clone(),
            weights: checkpoint.files()?,
            config: checkpoint.config().clone(),
            dtype: model.dtype.clone(),
            device: options.device.kind.clone(),
            tokenizer: tokenizer.clone(),
            kv_memory_bytes: memory.kv_bytes(cache, 1)?.unwrap_or(KV_BYTES),
            max_sequences: cache.max_sequences,
            queue: queue.clone(),
        })?;
        Ok(Arc::new(Mistral {
            name: name.to_owned(),
            path: checkpoint.path().clone(),
            dtype: model.dtype.clone(),
            stored: checkpoint.stored_dtype(),
            defaults: checkpoint.generation_defaults(),
            longest: model.max_model_len,
            max_model_len: model.max_model_len.map_or(context, |longest| longest.min(context)),
            tokenizer,
            queue,
            runner,
        }))
    }

    /// Queues a request. Bad parameters are a 400, as is what mistral.rs cannot do; a full queue is a 429. Dropping the stream
    /// cancels the request.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        request.validate(self.tokenizer.id_limit() as usize, self.max_model_len)?;
        let params = &request.params;
        let refused = [
            ("prompt_logprobs", params.prompt_logprobs.is_some()),
            ("ignore_eos", params.ignore_eos),
            ("priority", params.priority != 0),
            ("cache_salt", params.cache_salt.is_some()),
        ];
        if let Some((field, _)) = refused.into_iter().find(|(_, given)| *given) {
            let text = format!("`{}` runs on mistralrs, which has no `{field}`", request.role);
            return Err(Error::new(Code::UnsupportedParameter, text).at(field));
        }
        if request.task == Task::Score {
            return Err(Error::invalid("model", "a model on mistralrs is a language model without a score head"));
        }
        self.queue.enter(request.role)?;
        let (events, stream) = tokio::sync::mpsc::unbounded_channel();
        self.runner.run(Writer::new(request, events, self.tokenizer.clone(), self.max_model_len))?;
        Ok(stream)
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Longest prompt + answer, tokens.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Most requests of a role that may wait.
    pub fn max_waiting(&self) -> usize {
        self.queue.most()
    }
}
