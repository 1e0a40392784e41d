//! The serving engine: one owner thread per checkpoint holds the KV pool and runs flat steps; everything else talks to it
//! through the cloneable [`Engine`].

mod gate;
pub mod request;

use std::sync::Arc;

pub use gate::{Gate, GateGuard};
pub use request::{Event, EventStream, FinishReason, Request, SamplingParams, Task, TokenLogprob, Usage};

use crate::error::Result;
use crate::model::Decoder;
use crate::text::Tokenizer;

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
    /// Most requests waiting before a 429.
    pub max_waiting: usize,
    /// Longest prompt + answer, tokens; the model's own limit when `None`.
    pub max_model_len: Option<usize>,
    /// Share KV of equal prefixes.
    pub prefix_caching: bool,
}

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

/// Handle of an engine. Dropping the last one stops the thread.
#[derive(Clone)]
pub struct Engine {}

impl Engine {
    /// Allocates the pool and starts the owner thread.
    pub fn start(_model: Arc<Decoder>, _tokenizer: Arc<Tokenizer>, _options: EngineOptions) -> Result<Self> {
        todo!()
    }

    /// Queues a request. Bad parameters are a 400, a full queue a 429. Dropping the stream cancels the request.
    pub fn submit(&self, _request: Request) -> Result<EventStream> {
        todo!()
    }

    /// The device gate this engine shares with training.
    pub fn gate(&self) -> Arc<Gate> {
        todo!()
    }

    /// The model it serves.
    pub fn model(&self) -> &Arc<Decoder> {
        todo!()
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        todo!()
    }

    /// Longest prompt + answer, tokens.
    pub fn max_model_len(&self) -> usize {
        todo!()
    }

    /// Current numbers.
    pub fn stats(&self) -> EngineStats {
        todo!()
    }
}
