//! Who answers: a model name becomes an engine, a tokenizer and a pinned adapter generation.

mod adapters;
mod options;
mod reward;

use std::sync::Arc;

pub use adapters::{AdapterCard, Adapters, Lease, PublishMode};
pub use options::{
    AdapterOptions, DeviceOptions, JudgeOptions, KvCacheOptions, ModelOptions, RewardOptions, RoleOptions, RolesOptions,
};
pub use reward::{Reward, Rubric, Score};

use crate::engine::{Engine, EventStream, Request, SamplingParams};
use crate::error::Result;
use crate::text::{Message, RenderOptions, Tokenizer};
use crate::weights::GenerationDefaults;

/// Which role a name belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Answers, criticizes, revises.
    Teacher,
    /// Scores.
    Reward,
    /// Learns and serves.
    Student,
}

impl Role {
    /// Name in the config, the API and the metrics.
    pub fn name(self) -> &'static str {
        match self {
            Role::Teacher => "teacher",
            Role::Reward => "reward",
            Role::Student => "student",
        }
    }
}

/// A resolved model name: everything a request needs, pinned until dropped.
#[derive(Clone)]
pub struct Target {
    /// The name as asked.
    pub model: String,
    /// Its role.
    pub role: Role,
    /// The engine that serves it (for a reward without one, see [`Target::reward`]).
    pub engine: Option<Engine>,
    /// The adapter pinned for this request; `None` for a base.
    pub lease: Option<Lease>,
    /// Set when the name is the reward role.
    pub reward: Option<Arc<Reward>>,
    /// The checkpoint's sampling defaults.
    pub defaults: GenerationDefaults,
}

impl Target {
    /// The engine; a 400 naming `model` for a reward role that generates nothing.
    pub fn engine(&self) -> Result<&Engine> {
        todo!()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        Ok(self.engine()?.tokenizer())
    }

    /// Queues generation from token ids under the pinned adapter.
    pub fn generate(&self, _prompt: Vec<u32>, _params: SamplingParams) -> Result<EventStream> {
        todo!()
    }

    /// Renders the chat and queues generation.
    pub fn chat(&self, messages: &[Message], render: &RenderOptions, params: SamplingParams) -> Result<EventStream> {
        let prompt = self.tokenizer()?.encode_chat(messages, render)?;
        self.generate(prompt, params)
    }

    /// A bare request under the pinned adapter, for other tasks.
    pub fn request(&self, _prompt: Vec<u32>, _params: SamplingParams) -> Request {
        todo!()
    }
}

/// A row of `GET /v1/models`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelCard {
    /// Model name to ask for.
    pub id: String,
    /// Path of the checkpoint or adapter.
    pub root: String,
    /// Base model of an adapter.
    pub parent: Option<String>,
    /// Context, tokens.
    pub max_model_len: usize,
    /// Integer version of an alias.
    pub adapter_version: Option<u64>,
    /// Content hash of the adapter.
    pub adapter_generation: Option<String>,
    /// Unix seconds.
    pub created: i64,
}

/// The loaded models and adapters. Shared by server and jobs.
pub struct Roles {}

impl Roles {
    /// Opens every checkpoint once, starts one engine per checkpoint, re-publishes the adapters that were live.
    pub fn load(_options: RolesOptions) -> Result<Arc<Self>> {
        todo!()
    }

    /// `teacher`, `reward`, `student`, `student@<version>`, `student:base`, or an adapter alias (also `alias@<version>`). 404 if
    /// there is no such name; never the base in place of an adapter.
    pub fn resolve(&self, _model: &str) -> Result<Target> {
        todo!()
    }

    /// The teacher.
    pub fn teacher(&self) -> Result<Target> {
        self.resolve("teacher")
    }

    /// The reward role.
    pub fn reward(&self) -> Result<Arc<Reward>> {
        todo!()
    }

    /// The student's engine with the adapter off.
    pub fn student_base(&self) -> Result<Target> {
        self.resolve("student:base")
    }

    /// Adapters of the student.
    pub fn adapters(&self) -> &Adapters {
        todo!()
    }

    /// Everything that can be asked for.
    pub fn list(&self) -> Vec<ModelCard> {
        todo!()
    }

    /// All engines, one per checkpoint, with the checkpoint's name.
    pub fn engines(&self) -> Vec<(String, Engine)> {
        todo!()
    }
}
