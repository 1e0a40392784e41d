//! Loads a model into mistral.rs from files of this machine; nothing is fetched.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_of_mistralrs::Device;
use candle_of_mistralrs::utils::cuda_is_available;
use mistralrs_core::{
    AdapterPaths, AutoDeviceMapParams, DefaultSchedulerMethod, DeviceMapSetting, GGUFLoaderBuilder, GGUFSpecificConfig,
    IsqType, Loader, LocalModelPaths, MemoryGpuConfig, MistralRsBuilder, ModelDType, ModelPaths, NormalLoaderBuilder,
    NormalSpecificConfig, PagedAttentionConfig, PagedCacheType, SchedulerConfig, parse_isq_value,
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::House;
use crate::error::{Error, Result};
use crate::roles::mistral::Plan;

/// mistral.rs on the plan's model, and the length of its context.
pub(super) async fn start(plan: &Plan) -> Result<(House, usize)> {
    let device = device(&plan.device)?;
    if device.is_cpu() && cfg!(all(target_arch = "x86_64", not(target_feature = "avx2"))) {
        tracing::warn!(
            model = plan.name,
            "mistralrs chooses its CPU kernels when it is compiled, and this build has slow ones: build with \
             RUSTFLAGS=\"-C target-cpu=native\", or use the native backend"
        );
    }
    let field = |key: &str| format!("models.{}.{key}", plan.name);
    let (dtype, quantization) = format(&plan.dtype, &device).map_err(|text| Error::invalid(field("dtype"), text))?;
    let is_file = plan.path.is_file();
    if is_file && quantization.is_some() {
        return Err(Error::invalid(field("dtype"), "a GGUF file runs on mistralrs as it is stored: leave it `auto`"));
    }
    let cannot = |error: &dyn std::fmt::Display| {
        Error::unprocessable(field("path"), format!("mistralrs cannot load {}: {error}", plan.path.display()))
    };
    let Some(end) = plan.tokenizer.eos_token_ids().first() else {
        return Err(cannot(&"it names no token that ends a text"));
    };
    let scratch = tempfile::tempdir()?;
    let paths = paths(plan, scratch.path())?;
    let name = plan.path.display().to_string();
    let loader: Box<dyn Loader> = if is_file {
        GGUFLoaderBuilder::new(None, None, name, Vec::new(), GGUFSpecificConfig::default(), false, None).build()
    } else {
        NormalLoaderBuilder::new(NormalSpecificConfig::default(), None, None, Some(name), false, None)
            .build(None)
            .map_err(|error| cannot(&format!("{error:#}")))?
    };
    let paged = device.is_cuda().then(|| {
        let memory = MemoryGpuConfig::MbAmount(plan.kv_memory_bytes >> 20);
        PagedAttentionConfig::new(None, memory, PagedCacheType::Auto)
    });
    let paged = paged.transpose().map_err(|error| cannot(&format!("{error:#}")))?;
    let map = match device {
        Device::Cpu => DeviceMapSetting::dummy(),
        _ => DeviceMapSetting::Auto(AutoDeviceMapParams::default_text()),
    };
    let pipeline = loader
        .load_model_from_path(&paths, &dtype, &device, true, map, quantization, paged)
        .map_err(|error| cannot(&format!("{error:#}")))?;
    let (context, cache) = {
        let metadata = pipeline.lock().await.get_metadata();
        (metadata.max_seq_len, metadata.cache_config.clone())
    };
    // On a CPU it mixes up what it computes together: its attention for one new token has one scratch space for the whole batch
    // (0.8.1, `flash_attn_cpu_single_q`).
    let on_cpu = device.is_cpu();
    let most = if on_cpu { None } else { NonZeroUsize::new(plan.max_sequences) };
    let most = most.unwrap_or(NonZeroUsize::MIN);
    let scheduler = match cache {
        Some(config) => SchedulerConfig::PagedAttentionMeta { max_num_seqs: most.get(), config },
        None => SchedulerConfig::DefaultScheduler { method: DefaultSchedulerMethod::Fixed(most) },
    };
    let engine = MistralRsBuilder::new(pipeline, scheduler, false, None)
        // On a CPU its cache of prefixes is never evicted: it would grow until memory is full. On a GPU a prompt of which all but one
        // token is cached goes through the kernel for decoding with shared memory for one key, and that writes past it; and a block
        // may be kept before its last key is written (0.8.1, `make_prompt_chunk` and `PagedAttentionScheduler::_preempt`).
        .with_no_prefix_cache(true)
        // Where an answer ends is decided here.
        .with_disable_eos_stop(true)
        .build()
        .await;
    tracing::info!(role = plan.role.name(), model = plan.name, context, "mistralrs has loaded the model");
    let house = House {
        engine,
        places: Arc::new(Semaphore::new(most.get())),
        queue: plan.queue.clone(),
        end: *end,
        vocabulary: plan.tokenizer.id_limit() as usize,
        // The same kernel, told that there is no key at all.
        shortest: if on_cpu { 1 } else { 2 },
    };
    Ok((house, context))
}

/// The files it reads. Its tokenizer is the one this server has, and its chat template is none: this server renders chats, and
/// some templates make mistral.rs fetch vocabularies.
fn paths(plan: &Plan, scratch: &Path) -> Result<Box<dyn ModelPaths>> {
    let write = |name: &str, text: String| -> Result<PathBuf> {
        let file = scratch.join(name);
        std::fs::write(&file, text)?;
        Ok(file)
    };
    let options = plan.tokenizer.options();
    let template = json!({"chat_template": "{{ messages }}", "eos_token": options.eos_token});
    Ok(Box::new(LocalModelPaths::new(
        write("tokenizer.json", options.tokenizer_json.clone())?,
        write("config.json", with_old_ropes(plan.config.clone()).to_string())?,
        write("tokenizer_config.json", template.to_string())?,
        plan.weights.clone(),
        AdapterPaths::None,
        None,
        None,
        None,
        None,
    )))
}

/// transformers 5 writes `rope_parameters`, where mistral.rs looks for `rope_theta`, `partial_rotary_factor` and `rope_scaling`.
fn with_old_ropes(mut config: Value) -> Value {
    let new = config["rope_parameters"].clone();
    if let Some(fields) = config.as_object_mut().filter(|_| new["rope_theta"].is_number()) {
        for key in ["rope_theta", "partial_rotary_factor"] {
            if !new[key].is_null() {
                fields.insert(key.into(), new[key].clone());
            }
        }
        if new["rope_type"] != "default" {
            fields.insert("rope_scaling".into(), new);
        }
    }
    config
}

/// Floats, or how to quantize when loaded.
fn format(text: &str, device: &Device) -> std::result::Result<(ModelDType, Option<IsqType>), String> {
    match text.parse() {
        // bf16 is slow on a CPU.
        Ok(ModelDType::Auto) if device.is_cpu() => Ok((ModelDType::F32, None)),
        Ok(dtype) => Ok((dtype, None)),
        // The native backend writes `q4_k`.
        Err(_) => {
            let floats = if device.is_cpu() { ModelDType::F32 } else { ModelDType::Auto };
            parse_isq_value(&text.replace("_k", "k"), Some(device)).map(|kind| (floats, Some(kind)))
        }
    }
}

/// The device of `[device]`, whose form was checked.
fn device(kind: &str) -> Result<Device> {
    let ordinal = match kind {
        "cpu" => return Ok(Device::Cpu),
        "auto" if !cuda_is_available() => return Ok(Device::Cpu),
        other => other.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok()).unwrap_or(0),
    };
    if !cuda_is_available() {
        let text =
            "mistralrs has no CUDA in this build: build with `--features mistralrs-cuda`, or set `auto` or `cpu`";
        return Err(Error::invalid("device.kind", text));
    }
    match Device::new_cuda(ordinal) {
        Ok(device) => Ok(device),
        Err(error) if kind == "auto" => {
            tracing::warn!(%error, "no CUDA device answers; mistralrs runs on the CPU");
            Ok(Device::Cpu)
        }
        Err(error) => Err(Error::invalid("device.kind", format!("cuda:{ordinal}: {error}"))),
    }
}
