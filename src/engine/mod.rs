//! The serving engine: one owner thread per checkpoint holds the KV pool and runs flat steps; everything else talks to it
//! through the cloneable [`Engine`].

mod batch;
mod blocks;
mod gate;
mod live;
mod lookup;
mod pick;
mod queue;
pub mod request;
mod sampler;
mod scheduler;
mod step;
mod writer;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::DType;

pub use gate::{Gate, GateGuard};
pub use lookup::{SpeculativeMethod, SpeculativeOptions};
pub use queue::Queue;
pub use request::{Event, EventStream, FinishReason, Request, SamplingParams, Task, TokenLogprob, Usage};
pub use sampler::{Draw, sample};
pub use scheduler::{Limits, Scheduled, Scheduler, Sequence};
pub use writer::{Ending, Outcome, Writer};

use crate::error::{Code, Error, Result};
use crate::model::{Decoder, KvPool};
use crate::telemetry::metrics;
use crate::text::Tokenizer;
use step::Owner;

/// Limits of one engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Name in metrics (`model_name`).
    pub name: String,
    /// Tokens per block.
    pub block_size: usize,
    /// Bytes of KV pool.
    pub kv_memory_bytes: usize,
    /// Most tokens in one flat step (chunked prefill fills up to it).
    pub max_batch_tokens: usize,
    /// Most sequences running at once.
    pub max_sequences: usize,
    /// Most requests of a role waiting before a 429.
    pub max_waiting: usize,
    /// Longest prompt + answer, tokens; the model's own limit when `None`.
    pub max_model_len: Option<usize>,
    /// Share KV of equal prefixes.
    pub prefix_caching: bool,
    /// Drafts.
    pub speculative: SpeculativeOptions,
}

impl EngineOptions {
    /// Bytes of the pool that an engine of these options has for `model`.
    pub fn pool_bytes(&self, model: &Decoder) -> Result<usize> {
        let (blocks, block_bytes) = self.pool(model)?;
        Ok(blocks * block_bytes)
    }

    /// Blocks, and bytes of each: what the memory holds, but no more than every sequence at full length could use.
    fn pool(&self, model: &Decoder) -> Result<(usize, usize)> {
        for (name, value) in [
            ("kv_cache.block_size", self.block_size),
            ("kv_cache.max_batch_tokens", self.max_batch_tokens),
            ("kv_cache.max_sequences", self.max_sequences),
        ] {
            if value == 0 {
                return Err(Error::invalid(name, format!("`{name}` must be at least 1")));
            }
        }
        if self.block_size > MOST_BLOCK_SIZE {
            let message = format!("`kv_cache.block_size` must be at most {MOST_BLOCK_SIZE} tokens");
            return Err(Error::invalid("kv_cache.block_size", message));
        }
        let block_bytes = KvPool::block_bytes(model.config(), self.block_size, kv_dtype(model));
        let most = self.max_sequences.saturating_mul(self.longest(model).div_ceil(self.block_size));
        Ok(((self.kv_memory_bytes / block_bytes).min(most), block_bytes))
    }

    /// Longest prompt + answer, tokens.
    fn longest(&self, model: &Decoder) -> usize {
        let most = model.config().max_position_embeddings;
        self.max_model_len.unwrap_or(most).min(most)
    }
}

fn kv_dtype(model: &Decoder) -> DType {
    if model.device().is_cpu() { DType::F32 } else { model.compute_dtype() }
}

/// Tokens a block may have: far beyond what is of use.
const MOST_BLOCK_SIZE: usize = 4096;

/// Numbers an operator asks for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Sequences running.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// Blocks in the pool.
    pub total_blocks: usize,
    /// Blocks that hold no live or cached KV.
    pub free_blocks: usize,
    /// Blocks that hold only reusable cached KV.
    pub cached_blocks: usize,
}

/// What handle and owner thread share.
struct Shared {
    name: String,
    model: Arc<Decoder>,
    tokenizer: Arc<Tokenizer>,
    gate: Arc<Gate>,
    max_model_len: usize,
    queue: Queue,
    stats: Mutex<EngineStats>,
    /// What this engine last added to the gauges of a role, which all engines share.
    counted: Mutex<HashMap<&'static str, (i64, i64)>>,
    /// Cleared when the owner thread ends.
    alive: AtomicBool,
}

/// Says that the owner thread has ended, however it did.
struct ThreadEnd(Arc<Shared>);

impl Drop for ThreadEnd {
    fn drop(&mut self) {
        self.0.alive.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    fn count(&self, role: &'static str, running: i64, waiting: i64) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = counted.insert(role, (running, waiting)).unwrap_or_default();
        if before != (running, waiting) {
            metrics().requests_running.with_label_values(&[role]).add(running - before.0);
            metrics().requests_waiting.with_label_values(&[role]).add(waiting - before.1);
        }
    }
}

/// Handle of an engine. Dropping the last one stops the thread.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    commands: Sender<Writer>,
}

impl Engine {
    /// Allocates the pool and starts the owner thread.
    pub fn start(
        model: Arc<Decoder>,
        tokenizer: Arc<Tokenizer>,
        gate: Arc<Gate>,
        options: EngineOptions,
    ) -> Result<Self> {
        options.speculative.check()?;
        let (num_blocks, block_bytes) = options.pool(&model)?;
        if num_blocks * options.block_size < 2 {
            return Err(Error::invalid(
                "kv_cache.memory",
                format!(
                    "{} bytes hold no block of {} tokens, which takes {block_bytes} bytes",
                    options.kv_memory_bytes, options.block_size
                ),
            ));
        }
        let (config, block_size, longest) = (model.config(), options.block_size, options.longest(&model));
        let dtype = kv_dtype(&model);
        let pool = KvPool::new(config, num_blocks, block_size, dtype, model.device())?;
        metrics().gpu_memory_bytes.with_label_values(&["kv"]).add(pool.bytes() as i64);
        let shared = Arc::new(Shared {
            name: options.name.clone(),
            max_model_len: longest.min(num_blocks * block_size),
            queue: Queue::new(options.max_waiting),
            stats: Mutex::new(EngineStats {
                total_blocks: num_blocks,
                free_blocks: num_blocks,
                ..EngineStats::default()
            }),
            counted: Mutex::new(HashMap::new()),
            alive: AtomicBool::new(true),
            model,
            tokenizer,
            gate,
        });
        let limits = Limits {
            max_batch_tokens: options.max_batch_tokens,
            max_sequences: options.max_sequences,
            block_size,
            prefix_caching: options.prefix_caching,
        };
        let owner = Owner::new(shared.clone(), pool, Scheduler::new(limits, num_blocks), options.speculative);
        let (commands, receiver) = channel();
        std::thread::Builder::new().name(format!("engine-{}", options.name)).spawn(move || {
            let _end = ThreadEnd(owner.shared.clone());
            let bytes = owner.pool.bytes();
            owner.run(&receiver);
            metrics().gpu_memory_bytes.with_label_values(&["kv"]).sub(bytes as i64);
        })?;
        Ok(Engine { shared, commands })
    }

    /// Queues a request. Bad parameters are a 400, a full queue a 429. Dropping the stream cancels the request.
    pub fn submit(&self, request: Request) -> Result<EventStream> {
        request.validate(self.shared.model.config().vocab_size, self.shared.max_model_len)?;
        let scores = self.shared.model.config().num_labels > 0;
        if scores != (request.task == Task::Score) {
            let what = if scores {
                "is a sequence classifier: it gives scores and cannot generate text"
            } else {
                "is a language model without a score head"
            };
            return Err(Error::invalid("model", format!("The model {what}.")));
        }
        if scores && request.params.prompt_logprobs.is_some() {
            return Err(Error::invalid("prompt_logprobs", "A sequence classifier has no `prompt_logprobs`."));
        }
        let stopped = || Error::new(Code::Overloaded, "the engine has stopped");
        // What waited when it stopped has its places for ever.
        if !self.is_alive() {
            return Err(stopped());
        }
        self.shared.queue.enter(request.role)?;
        let (events, stream) = tokio::sync::mpsc::unbounded_channel();
        let writer = Writer::new(request, events, self.shared.tokenizer.clone(), self.shared.max_model_len);
        self.commands.send(writer).map_err(|_| stopped())?;
        Ok(stream)
    }

    /// The device gate this engine shares with training.
    pub fn gate(&self) -> Arc<Gate> {
        self.shared.gate.clone()
    }

    /// The model it serves.
    pub fn model(&self) -> &Arc<Decoder> {
        &self.shared.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.shared.tokenizer
    }

    /// Longest prompt + answer, tokens.
    pub fn max_model_len(&self) -> usize {
        self.shared.max_model_len
    }

    /// Whether its thread runs.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Relaxed)
    }

    /// Most requests of a role that may wait.
    pub fn max_waiting(&self) -> usize {
        self.shared.queue.most()
    }

    /// Current numbers.
    pub fn stats(&self) -> EngineStats {
        let stats = self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner).clone();
        EngineStats { waiting: self.shared.queue.waiting(), ..stats }
    }
}
