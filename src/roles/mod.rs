//! Who answers: a model name becomes an engine, a tokenizer and a pinned adapter generation, or the endpoints of a remote model.

mod adapters;
mod confine;
mod flight;
mod judge;
mod load;
mod mistral;
mod options;
mod plan;
mod pool;
mod remote;
mod reward;
mod rules;
mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub use crate::engine::{Gate, GateGuard};
pub use crate::weights::AdapterFile;
pub(crate) use adapters::live_on_disk;
pub use adapters::{AdapterCard, Adapters, Lease, PublishMode};
pub use confine::confined;
pub use flight::usage;
pub use judge::fill;
pub use mistral::Mistral;
pub use options::{
    AdapterOptions, Backend, DeviceOptions, HttpRewardOptions, JudgeMode, JudgeOptions, KvCacheOptions, ModelOptions,
    RewardOptions, RoleOptions, RolesOptions, RuleOptions,
};
pub use plan::MemoryPlan;
pub use remote::{Chunks, Remote, Start};
pub use reward::{Reward, Rubric, Score};
pub use target::{Answer, Seat, Target};

pub use crate::weights::GenerationDefaults;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::model::Adapter;
use crate::telemetry::metrics;
use crate::train::TrainingOptions;
use crate::weights::LoraConfig;
use load::{Backing, Loaded, Loader};

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
pub struct Roles {
    teacher: Backing,
    student: Arc<Loaded>,
    /// The judge's or classifier's model; other rewards have none.
    judge: Option<Backing>,
    reward: Arc<Reward>,
    adapters: Adapters,
    loaded: Vec<Arc<Loaded>>,
    memory: MemoryPlan,
    max_sequences: usize,
    created: i64,
}

impl Roles {
    /// Opens every checkpoint once, starts one engine per checkpoint, re-publishes the adapters that were live.
    pub fn load(options: RolesOptions) -> Result<Arc<Self>> {
        options.check()?;
        let mut loader = Loader::new(&options)?;
        let teacher = loader.find(Role::Teacher, &options.teacher)?;
        let student = loader.get("student", &options.student.model)?;
        let judge = match &options.reward {
            RewardOptions::Judge(judge) => Some(loader.find(Role::Reward, &judge.role)?),
            RewardOptions::Classifier(classifier) => Some(loader.find(Role::Reward, classifier)?),
            RewardOptions::Rules { .. } | RewardOptions::Http(_) => None,
        };
        let (loaded, memory) = loader.start(student)?;
        let (teacher, student) = (teacher.backing(&loaded), loaded[student].clone());
        let judge = judge.map(|judge| judge.backing(&loaded));
        let native = match &teacher {
            Backing::Native(teacher) => Some(teacher),
            Backing::Mistral(_) | Backing::Remote(_) => None,
        };
        for (role, one) in [("teacher", native), ("student", Some(&student))] {
            if let Some(one) = one.filter(|one| one.engine.model().config().num_labels > 0) {
                return Err(Error::invalid(
                    format!("roles.{role}.model"),
                    format!("`{}` is a classifier; it cannot generate", one.name),
                ));
            }
        }
        let target = judge.as_ref().map(|judge| judge.target("reward", Role::Reward));
        let reward = Arc::new(Reward::new(&options.reward, target)?);
        let adapters = Adapters::open(student.engine.model().clone(), &options.adapters)?;
        let roles = Roles {
            teacher,
            student,
            judge,
            reward,
            adapters,
            loaded,
            memory,
            max_sequences: options.kv_cache.max_sequences,
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64),
        };
        roles.show();
        roles.memory.announce();
        Ok(Arc::new(roles))
    }

    /// `teacher`, `reward`, `student`, `student@<version>`, `student:base`, or an adapter alias (also `alias@<version>`). 404 if
    /// there is no such name; never the base in place of an adapter.
    pub fn resolve(&self, model: &str) -> Result<Target> {
        match model {
            "teacher" => return Ok(self.teacher.target(model, Role::Teacher)),
            "student:base" => return Ok(target(model, Role::Student, &self.student)),
            "reward" => {
                let empty = Target {
                    model: model.to_owned(),
                    role: Role::Reward,
                    seat: Seat::Empty,
                    lease: None,
                    reward: None,
                    defaults: GenerationDefaults::default(),
                };
                let base = self.judge.as_ref().map_or(empty, |judge| judge.target(model, Role::Reward));
                return Ok(Target { reward: Some(self.reward.clone()), ..base });
            }
            _ => {}
        }
        let lease = match model.rsplit_once('@') {
            Some((alias, version)) => {
                let version = version.parse().map_err(|_| Error::no_model(model))?;
                Some(self.adapters.at(alias, version)?)
            }
            None => self.adapters.live(model),
        };
        match lease {
            Some(lease) => Ok(Target { lease: Some(lease), ..target(model, Role::Student, &self.student) }),
            // Nothing is published yet: the student is its base, and answers say version 0.
            None if model == "student" => Ok(target(model, Role::Student, &self.student)),
            None => Err(Error::no_model(model)),
        }
    }

    /// The teacher.
    pub fn teacher(&self) -> Result<Target> {
        self.resolve("teacher")
    }

    /// The reward role.
    pub fn reward(&self) -> Result<Arc<Reward>> {
        Ok(self.reward.clone())
    }

    /// The student's engine with the adapter off.
    pub fn student_base(&self) -> Result<Target> {
        self.resolve("student:base")
    }

    /// Adapters of the student.
    pub fn adapters(&self) -> &Adapters {
        &self.adapters
    }

    /// How the device's memory is divided.
    pub fn memory(&self) -> &MemoryPlan {
        &self.memory
    }

    /// Whether the device has the memory to train such an adapter; a 422 with the numbers where it has not.
    pub fn fits(&self, lora: &LoraConfig, training: &TrainingOptions) -> Result<()> {
        self.memory.fits(self.student.engine.model(), lora, training, self.adapters.resident_bytes())
    }

    /// Name under `[models]` of the student's checkpoint.
    pub fn student_model(&self) -> &str {
        &self.student.name
    }

    /// What speaks against an adapter that fits the student: it says it was made for another model. Names are compared without
    /// owner and case, and a file's name may go on after the model's.
    pub fn doubt(&self, adapter: &Adapter) -> Option<String> {
        let said = adapter.config.base_model_name_or_path.as_deref().filter(|name| !name.is_empty())?;
        let last =
            |name: &str| name.trim_end_matches('/').rsplit(['/', '\\']).next().unwrap_or_default().to_lowercase();
        let (path, base) = (&self.student.path, last(said));
        let folder = path.parent().filter(|_| path.is_file());
        let names = [Some(path.as_path()), folder].into_iter().flatten().map(|path| last(&path.display().to_string()));
        if names.chain([self.student.name.to_lowercase()]).any(|name| name.starts_with(&base)) {
            return None;
        }
        Some(format!(
            "its adapter_config.json says it was made for `{said}`, and the student is `{}` at {}: it fits, but if the weights differ \
             so will its answers",
            self.student.name,
            path.display()
        ))
    }

    /// Pieces of work worth having in flight that ask all of these: what an engine runs at once, or where none of them is here, what the
    /// widest remote one takes. More would fill the queues that users wait in.
    pub fn max_in_flight<'a>(&self, asked: impl IntoIterator<Item = &'a Target> + Clone) -> usize {
        let remote = asked.clone().into_iter().filter_map(Target::remote).map(|remote| remote.capacity()).max();
        let here = asked.into_iter().any(|target| matches!(target.seat, Seat::Native(_) | Seat::Mistral(_)));
        let most = if here { self.max_sequences } else { 4096 };
        remote.unwrap_or(self.max_sequences).clamp(1, most)
    }

    /// Folder that job files are confined to: the one that holds the adapter root.
    pub fn data_root(&self) -> PathBuf {
        self.adapters.root().parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
    }

    /// Everything that can be asked for.
    pub fn list(&self) -> Vec<ModelCard> {
        let base = |id: &str, loaded: &Loaded| ModelCard {
            id: id.to_owned(),
            root: loaded.path.display().to_string(),
            parent: None,
            max_model_len: loaded.engine.max_model_len(),
            adapter_version: None,
            adapter_generation: None,
            created: self.created,
        };
        // Without a model here there is no path and no context.
        let other =
            |id: &str, root: &str| ModelCard { root: root.to_owned(), max_model_len: 0, ..base(id, &self.student) };
        let card = |id: &str, backing: &Backing| match backing {
            Backing::Native(loaded) => base(id, loaded),
            Backing::Mistral(mistral) => {
                let root = mistral.path.display().to_string();
                ModelCard { max_model_len: mistral.max_model_len(), ..other(id, &root) }
            }
            Backing::Remote(remote) => other(id, remote.model()),
        };
        let mut cards = vec![card("teacher", &self.teacher)];
        cards.push(
            self.judge.as_ref().map_or_else(|| other("reward", self.reward.kind()), |judge| card("reward", judge)),
        );
        let adapters = self.adapters.list();
        if !adapters.iter().any(|card| card.alias == "student" && card.live) {
            cards.push(ModelCard { adapter_version: Some(0), ..base("student", &self.student) });
        }
        cards.push(base("student:base", &self.student));
        for card in adapters {
            let named = |id: String| ModelCard {
                root: card.source.display().to_string(),
                parent: Some("student:base".into()),
                adapter_version: Some(card.version),
                adapter_generation: Some(card.generation.clone()),
                ..base(&id, &self.student)
            };
            if card.live {
                cards.push(named(card.alias.clone()));
            }
            cards.push(named(format!("{}@{}", card.alias, card.version)));
        }
        cards
    }

    /// All engines, one per checkpoint, with the checkpoint's name.
    pub fn engines(&self) -> Vec<(String, Engine)> {
        self.loaded.iter().map(|one| (one.name.clone(), one.engine.clone())).collect()
    }

    fn show(&self) {
        let student = Backing::Native(self.student.clone());
        let seats = [("teacher", Some(&self.teacher)), ("student", Some(&student)), ("reward", self.judge.as_ref())];
        for (role, seat) in seats {
            let (name, dtype, stored) = match seat {
                Some(Backing::Native(one)) => (one.name.clone(), one.weights.to_string(), one.stored.clone()),
                Some(Backing::Mistral(one)) => (one.name.clone(), one.dtype.clone(), one.stored.clone()),
                Some(Backing::Remote(remote)) => (remote.model().to_owned(), "remote".into(), "remote".into()),
                None => (self.reward.kind().to_owned(), "none".to_owned(), "none".to_owned()),
            };
            metrics().model_info.with_label_values(&[role, &name, &dtype, &stored]).set(1);
            metrics().model_loaded.with_label_values(&[role]).set(1);
        }
    }
}

impl Backing {
    fn target(&self, model: &str, role: Role) -> Target {
        let (seat, defaults) = match self {
            Backing::Native(loaded) => return target(model, role, loaded),
            Backing::Mistral(mistral) => (Seat::Mistral(mistral.clone()), mistral.defaults.clone()),
            Backing::Remote(remote) => (Seat::Remote(remote.clone()), GenerationDefaults::default()),
        };
        Target { model: model.to_owned(), role, seat, lease: None, reward: None, defaults }
    }
}

fn target(model: &str, role: Role, loaded: &Loaded) -> Target {
    Target {
        model: model.to_owned(),
        role,
        seat: Seat::Native(loaded.engine.clone()),
        lease: None,
        reward: None,
        defaults: loaded.defaults.clone(),
    }
}
