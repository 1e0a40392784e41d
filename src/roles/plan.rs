//! Who gets how much of the device's memory: measured when the server starts, divided by the settings, asked again before a job.

use candle_core::Device;

use super::{AdapterOptions, DeviceOptions, KvCacheOptions};
use crate::engine::EngineOptions;
use crate::error::{Error, Result};
use crate::model::{Decoder, DeviceMemory, TrainingMemory, TrainingSize, device_memory};
use crate::size::{bytes, bytes_of, show};
use crate::telemetry::metrics;
use crate::train::{LoraOptions, TrainingOptions};
use crate::weights::LoraConfig;

/// A pool that is `auto` on a CPU, where taking all there is would leave nothing to others; and in mistral.rs, which is there first.
pub(super) const KV_BYTES: usize = 2 << 30;
/// What the server may use of a GPU when nothing is said: scratch of the libraries and holes between allocations need the rest.
const GPU_SHARE: &str = "90%";

/// What the server may use of the device, before anything is loaded.
#[derive(Clone)]
pub(super) struct Room {
    device: Device,
    /// As the device was found.
    found: DeviceMemory,
    /// `device.memory`, and no more than is free.
    usable: usize,
}

impl Room {
    pub(super) fn measure(device: &Device, options: &DeviceOptions) -> Result<Self> {
        Room::of(device, device_memory(device)?, options)
    }

    fn of(device: &Device, found: DeviceMemory, options: &DeviceOptions) -> Result<Self> {
        let share = if device.is_cpu() { "100%" } else { GPU_SHARE };
        let limit = bytes_of(options.memory.as_deref().unwrap_or(share), found.total, "device.memory")?;
        Ok(Room { device: device.clone(), found, usable: limit.min(found.free as usize) })
    }

    /// Bytes of the pool of each of `pools` checkpoints; `None` where it is `auto`.
    pub(super) fn kv_bytes(&self, options: &KvCacheOptions, pools: usize) -> Result<Option<usize>> {
        let (text, field) = (options.memory.trim(), "kv_cache.memory");
        match text {
            "auto" => Ok(None),
            _ if text.ends_with('%') => Ok(Some(bytes_of(text, self.found.total, field)? / pools.max(1))),
            _ => bytes(text, field).map(Some).map_err(|error| {
                Error::invalid(field, format!("{}, or as a share like \"40%\", or leave it \"auto\"", error.message))
            }),
        }
    }
}

/// The settings that a plan is made of.
pub(super) struct Wishes<'a> {
    pub(super) kv_cache: &'a KvCacheOptions,
    pub(super) adapters: &'a AdapterOptions,
}

/// The device's memory divided. Adapters and training are counted for the rank, the length and the batch that a job has when it
/// says nothing; what a job really asks for is looked at when it comes.
pub struct MemoryPlan {
    room: Room,
    weights: usize,
    /// By other things than this server's tensors that were there after loading: the driver's context, mistral.rs.
    other: usize,
    /// Of all checkpoints.
    kv: usize,
    /// `adapters.max_resident` of them.
    adapters: usize,
    job: TrainingMemory,
    /// How the settings' part of each line is called.
    notes: [String; 5],
}

impl MemoryPlan {
    /// Divides what is left beside `models`, which are loaded, each with the options that its engine will have; sets those engines'
    /// `kv_memory_bytes`. An error with the numbers where it cannot fit.
    pub(super) fn divide(
        room: Room,
        models: &mut [(&Decoder, &mut EngineOptions)],
        student: &Decoder,
        wishes: &Wishes<'_>,
    ) -> Result<Self> {
        room.device.synchronize()?;
        let weights: usize = models.iter().map(|(model, _)| model.bytes()).sum();
        let taken = room.found.free.saturating_sub(device_memory(&room.device)?.free) as usize;
        // Others come and go in main memory: what they took is not known from what the server took.
        let other = if room.device.is_cpu() { 0 } else { taken.saturating_sub(weights) };
        let lora = usual_lora(wishes.adapters);
        let adapters = wishes.adapters.max_resident.saturating_mul(student.adapter_bytes(&lora));
        let usual = TrainingOptions::default();
        let job = student.training_memory(&lora, &size(&usual)?);

        let wanted = room.kv_bytes(wishes.kv_cache, models.len())?;
        let left = room.usable.saturating_sub(sum([weights, other, adapters, job.total()]));
        let automatic = left / models.len().max(1);
        let each = wanted.unwrap_or(if room.device.is_cpu() { automatic.min(KV_BYTES) } else { automatic });
        let mut kv = 0;
        for (model, options) in models.iter_mut() {
            options.kv_memory_bytes = each;
            kv = sum([kv, options.pool_bytes(model)?]);
        }
        let pools = if models.len() > 1 { format!(", {} pools", models.len()) } else { String::new() };
        let notes = [
            "models.NAME.dtype says in what form".to_owned(),
            format!("kv_cache.memory = \"{}\"{pools}", wishes.kv_cache.memory),
            format!("adapters.max_resident = {}, of rank {}", wishes.adapters.max_resident, lora.r),
            format!("of a job with lora.r = {}", lora.r),
            format!(
                "of a job with training.max_length = {} and training.activation_memory = \"{}\"",
                usual.max_length, usual.activation_memory
            ),
        ];
        let plan = MemoryPlan { room, weights, other, kv, adapters, job, notes };
        plan.check(kv == 0)?;
        Ok(plan)
    }

    /// What must be there for serving has to fit; a job of the usual size is not worth a refusal.
    fn check(&self, no_cache: bool) -> Result<()> {
        let (fixed, usable) = (sum([self.weights, self.other]), self.room.usable);
        let needed = sum([fixed, self.kv, self.adapters]);
        if needed <= usable && !no_cache {
            return Ok(());
        }
        let field = if fixed > usable {
            "models"
        } else if sum([fixed, self.adapters]) > usable {
            "adapters.max_resident"
        } else {
            "kv_cache.memory"
        };
        let cache = if no_cache { "nothing is left for the key/value cache".to_owned() } else { self.cache() };
        Err(Error::invalid(
            field,
            format!(
                "the settings do not fit into the device's memory: weights {}{}, {cache}, adapters {} ({}) are {}, and the server \
                 may use {} (device.memory; {} of {} were free). Lower kv_cache.memory or adapters.max_resident, or give the \
                 models a narrower dtype (models.NAME.dtype)",
                show(self.weights),
                if self.other > 0 { format!(", other {}", show(self.other)) } else { String::new() },
                show(self.adapters),
                self.notes[2],
                show(needed),
                show(usable),
                show(self.room.found.free as usize),
                show(self.room.found.total as usize),
            ),
        ))
    }

    fn cache(&self) -> String {
        format!("key/value cache {} ({})", show(self.kv), self.notes[1])
    }

    /// The plan as lines of a table, the first of which is its head.
    pub fn lines(&self) -> Vec<String> {
        let name = if self.room.device.is_cpu() { "main memory" } else { "the GPU's memory" };
        let uses = self.uses().into_iter().zip(&self.notes).map(|((kind, bytes), note)| (kind, bytes, note.as_str()));
        let other = ("other", self.other, "driver, libraries, mistral.rs");
        let left = ("left", self.left(), "");
        let rows = uses.chain((self.other > 0).then_some(other)).chain([left]);
        let head = format!(
            "{name}: {}, {} free; the server may use {}",
            show(self.room.found.total as usize),
            show(self.room.found.free as usize),
            show(self.room.usable)
        );
        let row = |(kind, bytes, note): (&str, usize, &str)| format!("  {kind:<10} {:>10}  {note}", show(bytes));
        std::iter::once(head).chain(rows.map(row).map(|row| row.trim_end().to_owned())).collect()
    }

    /// By the kinds of the gauge.
    fn uses(&self) -> [(&'static str, usize); 5] {
        [
            ("weights", self.weights),
            ("kv", self.kv),
            ("adapter", self.adapters),
            ("optimizer", self.job.optimizer),
            ("activation", self.job.activations()),
        ]
    }

    fn left(&self) -> usize {
        let planned = sum(self.uses().map(|(_, bytes)| bytes));
        self.room.usable.saturating_sub(sum([planned, self.other]))
    }

    /// Logs the plan and exports it.
    pub(super) fn announce(&self) {
        self.lines().iter().for_each(|line| tracing::info!("{line}"));
        for (kind, bytes) in self.uses() {
            metrics().gpu_memory_planned_bytes.with_label_values(&[kind]).set(bytes as i64);
        }
        if self.room.usable < sum([self.weights, self.other, self.kv, self.adapters, self.job.total()]) {
            tracing::warn!("a job of the usual size does not fit beside this: it is refused unless it asks for less");
        }
        self.measure();
    }

    /// Measures the device and sets the gauges of what is free and of all of it.
    pub fn measure(&self) {
        match device_memory(&self.room.device) {
            Ok(now) => {
                metrics().gpu_memory_bytes.with_label_values(&["free"]).set(now.free as i64);
                metrics().gpu_memory_bytes.with_label_values(&["total"]).set(now.total as i64);
            }
            Err(error) => tracing::warn!(%error, "the device's memory cannot be measured"),
        }
    }

    /// Whether training such an adapter of `model` fits beside what serves, `resident` bytes of adapters among it. What a job in
    /// progress holds is not counted: it is given back before another one starts. A 422 with the numbers where it does not fit.
    pub(super) fn fits(
        &self,
        model: &Decoder,
        lora: &LoraConfig,
        training: &TrainingOptions,
        resident: usize,
    ) -> Result<()> {
        let job = model.training_memory(lora, &size(training)?);
        let held = |kind: &str| metrics().gpu_memory_bytes.with_label_values(&[kind]).get().max(0) as usize;
        let now = device_memory(&self.room.device)?.free as usize;
        let now = now.saturating_add(held("optimizer")).saturating_add(held("activation"));
        let room = self.room.usable.saturating_sub(sum([self.weights, self.other, self.kv, resident])).min(now);
        if job.total() <= room {
            return Ok(());
        }
        let levers = [
            (job.graphs, "training.activation_memory"),
            (job.step, "training.max_length"),
            (job.optimizer + job.copy, "lora.r"),
        ];
        let field = levers.into_iter().max_by_key(|(bytes, _)| *bytes).map_or("training", |(_, field)| field);
        Err(Error::unprocessable(
            field,
            format!(
                "this job does not fit into the device's memory: it takes up to {} (graphs kept for the backward {}, the rest of a step \
                 {}, LoRA with gradients and moments {}, the published copy {}), and {} of the {} that the server may use are left \
                 beside weights {}, key/value cache {} and adapters {}. What helps: a lower training.activation_memory (\"{}\"), \
                 training.max_length ({}), training.batch_size ({}) or lora.r ({}); or a smaller kv_cache.memory of the server",
                show(job.total()),
                show(job.graphs),
                show(job.step),
                show(job.optimizer),
                show(job.copy),
                show(room),
                show(self.room.usable),
                show(self.weights + self.other),
                show(self.kv),
                show(resident),
                training.activation_memory,
                training.max_length,
                training.batch_size,
                lora.r,
            ),
        ))
    }
}

/// Settings may ask for more than a number holds: that is still too much, not little.
fn sum<const N: usize>(parts: [usize; N]) -> usize {
    parts.into_iter().fold(0, usize::saturating_add)
}

/// The adapter of a job that says nothing, as far as the server takes its rank.
fn usual_lora(adapters: &AdapterOptions) -> LoraConfig {
    let usual = LoraOptions::default();
    LoraOptions { r: usual.r.min(adapters.max_rank), ..usual }.config(None)
}

fn size(options: &TrainingOptions) -> Result<TrainingSize> {
    Ok(TrainingSize {
        max_length: options.max_length,
        batch_size: options.batch_size,
        keep_bytes: options.activation_bytes()?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::{LoadOptions, WeightFormat};
    use crate::weights::Checkpoint;

    #[test]
    fn more_adapters_than_can_be_counted_are_refused() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-llama");
        let load = LoadOptions { device: Device::Cpu, weights: WeightFormat::Float(candle_core::DType::F32) };
        let model = Decoder::load(&Checkpoint::open(&path).unwrap(), &load).unwrap();
        for cache in ["auto", "1MiB"] {
            let room = Room::measure(&Device::Cpu, &DeviceOptions::default()).unwrap();
            let cache = KvCacheOptions { memory: cache.into(), ..KvCacheOptions::default() };
            let adapters = AdapterOptions { max_resident: i64::MAX as usize, ..AdapterOptions::default() };
            let mut engine = EngineOptions {
                name: "tiny".into(),
                block_size: cache.block_size,
                kv_memory_bytes: 0,
                max_batch_tokens: cache.max_batch_tokens,
                max_sequences: cache.max_sequences,
                max_waiting: cache.max_waiting,
                max_model_len: None,
                prefix_caching: cache.prefix_caching,
                speculative: Default::default(),
            };
            let wishes = Wishes { kv_cache: &cache, adapters: &adapters };
            let error = MemoryPlan::divide(room, &mut [(&model, &mut engine)], &model, &wishes).err().unwrap();
            assert_eq!(error.param.as_deref(), Some("adapters.max_resident"), "{error}");
            assert!(error.message.contains("adapters 16777216.0 TiB (adapters.max_resident = 92233"), "{error}");
        }
    }
}
