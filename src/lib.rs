//! rdpo serves a language model and aligns it at the same time, in one process, on one copy of the weights.
//!
//! **Serving, one request:**
//! 1. [`server`] parses a route's JSON into core types;
//! 2. [`roles`] resolves the model name to an engine and pins an adapter generation for the whole request; a remote role is
//!    asked at its endpoints, and what follows happens there; one on mistral.rs has its logits from there, and the rest of this;
//! 3. [`text`] renders the chat template and encodes token ids;
//! 4. [`engine`] queues the request on the one thread that owns the KV pool;
//! 5. its scheduler picks sequences, its block manager reserves cache, its batch builder lays out one flat step;
//! 6. [`model`] runs the decoder on [`ops`], which run on [`kernels`];
//! 7. the sampler draws tokens, the stream decoder turns them into text, [`server`] into SSE.
//!
//! **Learning, one job:**
//! 1. [`server`] validates and stores the job; [`jobs`] claims it;
//! 2. [`rdpo`] asks the teacher (through the same [`roles`] as any client), scores with the reward role, makes pairs;
//! 3. [`train`] runs the same [`model`] with LoRA variables and the generalized DPO loss;
//! 4. [`weights`] writes PEFT files; [`roles`] publishes the generation; running requests end on the one they began with.
//!
//! **Axis letters** in shape comments: N tokens of a flat step, S sequences, H query heads, K key/value heads, D head
//! dimension, C hidden size, F feed-forward size, V vocabulary, R LoRA rank.

pub mod cores;
pub mod error;
pub mod seed;
pub mod size;
pub mod telemetry;

pub mod cli;
pub mod config;

pub mod server;

pub mod roles;

pub mod engine;
pub mod model;
pub mod ops;

pub mod kernels;

pub mod text;
pub mod weights;

pub mod jobs;
pub mod rdpo;
pub mod train;
