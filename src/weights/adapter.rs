//! PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use regex::Regex;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::hex;
use crate::error::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// The part of PEFT's LoraConfig this server honours.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Rank.
    pub r: usize,
    /// Numerator of the scale.
    pub lora_alpha: f64,
    /// Dropout on the adapter's input while training.
    pub lora_dropout: f64,
    /// Sites by Hugging Face name.
    pub target_modules: Vec<String>,
    /// Scale by `alpha / √r`.
    pub use_rslora: bool,
    /// Module-name pattern → rank.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Module-name pattern → alpha.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Name of the base model, for the reader.
    pub base_model_name_or_path: Option<String>,
}

impl LoraConfig {
    /// Rank and scale of the module at `path` (`model.layers.0.self_attn.q_proj`), patterns applied as PEFT does: a key counts
    /// when it matches the whole path or its dotted tail as a regular expression.
    pub fn rank_and_scale(&self, path: &str) -> (usize, f64) {
        let r = pattern_value(&self.rank_pattern, path).unwrap_or(self.r);
        let alpha = pattern_value(&self.alpha_pattern, path).unwrap_or(self.lora_alpha);
        (r, if self.use_rslora { alpha / (r as f64).sqrt() } else { alpha / r as f64 })
    }

    /// Reads the JSON of `adapter_config.json`; `modules` are the module paths the tensors have.
    fn from_json(config: &Value, modules: &[&str]) -> Result<Self> {
        let fields = config
            .as_object()
            .ok_or_else(|| Error::unprocessable(CONFIG, "adapter_config.json is not a JSON object"))?;
        refuse_unsupported(fields)?;
        let alpha = |value: &Value, key: &str| {
            value
                .as_f64()
                .ok_or_else(|| Error::unprocessable(key, format!("`{key}` in adapter_config.json is not a number")))
        };
        let r = match fields.get("r") {
            None => 8,
            Some(value) => value
                .as_u64()
                .filter(|r| *r > 0)
                .ok_or_else(|| Error::unprocessable("r", "`r` in adapter_config.json is not a positive integer"))?,
        };
        let mut rank_pattern = BTreeMap::new();
        for (key, value) in patterns(fields, "rank_pattern")? {
            let rank = value.as_u64().filter(|rank| *rank > 0).ok_or_else(|| {
                Error::unprocessable("rank_pattern", format!("`rank_pattern.{key}` is not a positive integer"))
            })?;
            rank_pattern.insert(key.clone(), rank as usize);
        }
        let mut alpha_pattern = BTreeMap::new();
        for (key, value) in patterns(fields, "alpha_pattern")? {
            alpha_pattern.insert(key.clone(), alpha(value, "alpha_pattern")?);
        }
        // A list stays as it is; a regular expression or "all-linear" becomes the names of the modules the tensors have.
        let mut target_modules: Vec<String> = match fields.get("target_modules") {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            _ => modules.iter().filter_map(|path| path.rsplit('.').next()).map(str::to_owned).collect(),
        };
        target_modules.sort();
        target_modules.dedup();
        Ok(LoraConfig {
            r: r as usize,
            lora_alpha: fields.get("lora_alpha").map_or(Ok(8.0), |value| alpha(value, "lora_alpha"))?,
            lora_dropout: fields.get("lora_dropout").and_then(Value::as_f64).unwrap_or(0.0),
            target_modules,
            use_rslora: fields.get("use_rslora").and_then(Value::as_bool).unwrap_or(false),
            rank_pattern,
            alpha_pattern,
            base_model_name_or_path: fields.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned),
        })
    }

    /// PEFT's JSON: its keys, sorted, two spaces of indent.
    fn to_json(&self) -> Value {
        let whole = |value: f64| if value.fract() == 0.0 { json!(value as i64) } else { json!(value) };
        let mut targets = self.target_modules.clone();
        targets.sort();
        let alphas: Map<String, Value> =
            self.alpha_pattern.iter().map(|(key, value)| (key.clone(), whole(*value))).collect();
        json!({
            "alpha_pattern": alphas,
            "auto_mapping": null,
            "base_model_name_or_path": self.base_model_name_or_path,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "lora_alpha": whole(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": null,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        })
    }
}

/// The entries of a pattern setting, each key checked.
fn patterns<'a>(fields: &'a Map<String, Value>, name: &str) -> Result<Vec<(&'a String, &'a Value)>> {
    let entries: Vec<_> = match fields.get(name) {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Object(map)) => map.iter().collect(),
        Some(_) => return Err(Error::unprocessable(name, format!("`{name}` in adapter_config.json is not an object"))),
    };
    for (key, _) in &entries {
        check_pattern(key).map_err(|why| Error::unprocessable(name, format!("`{name}`: {why}")))?;
    }
    Ok(entries)
}

fn pattern_value<T: Copy>(patterns: &BTreeMap<String, T>, path: &str) -> Option<T> {
    patterns.iter().find_map(|(key, value)| {
        // Patterns were checked when the configuration was made; one that is no pattern matches nothing.
        let pattern = pattern_of(key).ok()?;
        pattern.is_match(path).then_some(*value)
    })
}

/// A key of `rank_pattern` or `alpha_pattern` as PEFT matches it: the whole path, or its end after a dot.
fn pattern_of(key: &str) -> std::result::Result<Regex, regex::Error> {
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$"))
}

/// Whether a key of `rank_pattern` or `alpha_pattern` can be used; says why not.
pub fn check_pattern(key: &str) -> std::result::Result<(), String> {
    pattern_of(key).map(drop).map_err(|error| format!("`{key}` is no pattern that can be matched here: {error}"))
}

/// A 422 for every setting that changes what the weights mean and that this server does not implement.
fn refuse_unsupported(fields: &Map<String, Value>) -> Result<()> {
    let refuse =
        |key: &str, why: String| Err(Error::unprocessable(key, format!("`{key}` in adapter_config.json: {why}")));
    match fields.get("peft_type").and_then(Value::as_str) {
        Some("LORA") => {}
        other => return refuse("peft_type", format!("is {}, only \"LORA\" can be served", other.unwrap_or("missing"))),
    }
    for key in ["use_dora", "lora_bias", "fan_in_fan_out", "use_qalora"] {
        if fields.get(key).and_then(Value::as_bool) == Some(true) {
            return refuse(key, "is true, which is not supported".into());
        }
    }
    for key in [
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "use_bdlora",
        "target_parameters",
        "kasa_config",
        "monteclora_config",
        "velora_config",
        "arrow_config",
        "lora_ga_config",
    ] {
        let set = match fields.get(key) {
            None | Some(Value::Null) | Some(Value::Bool(false)) => false,
            Some(Value::Array(list)) => !list.is_empty(),
            Some(Value::Object(map)) => !map.is_empty(),
            Some(_) => true,
        };
        if set {
            return refuse(key, "is set, which is not supported".into());
        }
    }
    if let Some(bias) = fields.get("bias").and_then(Value::as_str).filter(|bias| *bias != "none") {
        return refuse("bias", format!("is \"{bias}\", only \"none\" can be served"));
    }
    match fields.get("init_lora_weights") {
        None | Some(Value::Null | Value::Bool(_)) => Ok(()),
        Some(Value::String(name)) if ["gaussian", "eva", "orthogonal"].contains(&name.as_str()) => Ok(()),
        Some(other) => refuse(
            "init_lora_weights",
            format!("is {other}, which changes the base weights; convert the adapter first"),
        ),
    }
}

/// An adapter as it lies on disk: configuration and f32 tensors under PEFT's names.
#[derive(Clone, Debug)]
pub struct AdapterFile {
    /// The configuration.
    pub config: LoraConfig,
    /// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` → tensor.
    pub tensors: BTreeMap<String, Tensor>,
}

impl AdapterFile {
    /// Reads a folder. What cannot be honoured (DoRA, modules_to_save, PiSSA-style init …) is a 422 naming the key or tensor.
    pub fn read(folder: &Path) -> Result<Self> {
        let file = |name: &str| folder.join(name);
        let fail = |name: &str, error: &dyn std::fmt::Display| {
            Error::unprocessable(
                file(name).display().to_string(),
                format!("cannot read {name} of the adapter: {error}"),
            )
        };
        let text = std::fs::read(file(CONFIG)).map_err(|error| fail(CONFIG, &error))?;
        let json: Value = serde_json::from_slice(&text).map_err(|error| fail(CONFIG, &error))?;
        let bytes = std::fs::read(file(WEIGHTS)).map_err(|error| fail(WEIGHTS, &error))?;
        let loaded =
            candle_core::safetensors::load_buffer(&bytes, &Device::Cpu).map_err(|error| fail(WEIGHTS, &error))?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in loaded {
            if !name.ends_with(".lora_A.weight") && !name.ends_with(".lora_B.weight") {
                return Err(Error::unprocessable(
                    &name,
                    format!("tensor `{name}` is not a LoRA matrix of a linear layer"),
                ));
            }
            tensors.insert(name, tensor.to_dtype(DType::F32)?);
        }
        let modules: Vec<&str> = tensors.keys().filter_map(|name| name.strip_suffix(".lora_A.weight")).collect();
        let config = LoraConfig::from_json(&json, &modules)?;
        Ok(AdapterFile { config, tensors })
    }

    /// Writes a folder aside, syncs it and renames it into place; deterministic bytes. A folder already there is replaced.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let parent = folder.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent)?;
        let aside = tempfile::Builder::new().prefix(".adapter-").tempdir_in(parent)?;
        let mut config = serde_json::to_vec_pretty(&self.config.to_json())?;
        config.push(b'\n');
        write_synced(&aside.path().join(CONFIG), &config)?;
        write_synced(&aside.path().join(WEIGHTS), &self.weights()?)?;
        std::fs::File::open(aside.path())?.sync_all()?;
        let aside = aside.keep();
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        std::fs::rename(&aside, folder)?;
        std::fs::File::open(parent)?.sync_all()?;
        Ok(())
    }

    /// SHA-256 in hex over configuration and weights.
    pub fn generation(&self) -> Result<String> {
        // The base's name is for the reader and the dropout for the trainer: neither changes what the adapter computes.
        let config = LoraConfig { base_model_name_or_path: None, lora_dropout: 0.0, ..self.config.clone() };
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&config.to_json())?);
        hash.update(self.weights()?);
        Ok(hex(hash))
    }

    fn weights(&self) -> Result<Vec<u8>> {
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let failed = |error: safetensors::SafeTensorError| Error::internal(format!("adapter weights: {error}"));
        let mut bytes = Vec::new();
        for (name, tensor) in &self.tensors {
            let values = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            let little: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            bytes.push((name.as_str(), tensor.dims().to_vec(), little));
        }
        let views: Vec<(&str, TensorView<'_>)> = bytes
            .iter()
            .map(|(name, shape, bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(failed)?)))
            .collect::<Result<_>>()?;
        safetensors::serialize(views, Some(metadata)).map_err(failed)
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn adapter() -> AdapterFile {
        let tensor = |rows: usize, columns: usize| Tensor::rand(-1f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        let name = |kind: &str| format!("base_model.model.model.layers.0.self_attn.q_proj.lora_{kind}.weight");
        AdapterFile {
            config: LoraConfig {
                r: 4,
                lora_alpha: 8.0,
                lora_dropout: 0.0,
                target_modules: vec!["q_proj".into()],
                use_rslora: false,
                rank_pattern: BTreeMap::from([("layers.1.mlp.up_proj".into(), 2)]),
                alpha_pattern: BTreeMap::new(),
                base_model_name_or_path: Some("tiny".into()),
            },
            tensors: BTreeMap::from([(name("A"), tensor(4, 8)), (name("B"), tensor(8, 4))]),
        }
    }

    #[test]
    fn a_folder_comes_back_as_written_and_the_bytes_do_not_change() {
        let (root, adapter) = (tempfile::tempdir().unwrap(), adapter());
        let folder = root.path().join("one");
        adapter.write(&folder).unwrap();
        let first = std::fs::read(folder.join(WEIGHTS)).unwrap();
        let back = AdapterFile::read(&folder).unwrap();
        assert_eq!(back.config, adapter.config);
        assert_eq!(back.generation().unwrap(), adapter.generation().unwrap());
        back.write(&folder).unwrap();
        assert_eq!(std::fs::read(folder.join(WEIGHTS)).unwrap(), first);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "nothing is left aside");
    }

    #[test]
    fn patterns_match_the_dotted_tail_only() {
        let config = adapter().config;
        assert_eq!(config.rank_and_scale("model.layers.1.mlp.up_proj"), (2, 4.0));
        assert_eq!(config.rank_and_scale("model.layers.11.mlp.up_proj"), (4, 2.0));
        let rslora = LoraConfig { use_rslora: true, ..config };
        assert_eq!(rslora.rank_and_scale("model.layers.0.self_attn.q_proj"), (4, 4.0));
    }

    #[test]
    fn what_cannot_be_honoured_is_a_422_that_names_the_key() {
        let root = tempfile::tempdir().unwrap();
        for (key, value) in [
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("all")),
            ("init_lora_weights", json!("pissa")),
            ("peft_type", json!("IA3")),
            ("rank_pattern", json!({"[": 4})),
            ("rank_pattern", json!({"q_proj": 4.5})),
            ("alpha_pattern", json!([1])),
            ("arrow_config", json!({"top_k": 1})),
        ] {
            let folder = root.path().join(key);
            let _ = std::fs::remove_dir_all(&folder);
            adapter().write(&folder).unwrap();
            let mut config: Value = serde_json::from_slice(&std::fs::read(folder.join(CONFIG)).unwrap()).unwrap();
            config[key] = value;
            std::fs::write(folder.join(CONFIG), config.to_string()).unwrap();
            let error = AdapterFile::read(&folder).unwrap_err();
            assert_eq!((error.status(), error.param.as_deref()), (422, Some(key)));
        }
    }

    #[test]
    fn a_truncated_weight_file_is_a_422_that_names_the_file() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("short");
        adapter().write(&folder).unwrap();
        let bytes = std::fs::read(folder.join(WEIGHTS)).unwrap();
        std::fs::write(folder.join(WEIGHTS), &bytes[..bytes.len() / 2]).unwrap();
        let error = AdapterFile::read(&folder).unwrap_err();
        assert!(error.status() == 422 && error.param.unwrap().ends_with(WEIGHTS));
    }
}
