//! Hugging Face folders: `config.json`, safetensors (sharded too), tokenizer files, chat template.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};
use serde_json::Value;

use super::GenerationDefaults;
use crate::error::{Error, Result};
use crate::text::TokenizerOptions;

pub(super) struct Folder {
    path: PathBuf,
    pub(super) config: Value,
    tensors: MmapedSafetensors,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let config = read_json(&path.join("config.json"))?;
        let files = shards(path)?;
        for file in &files {
            if !file.is_file() {
                return Err(Error::unprocessable(file.display().to_string(), "the weight file is missing"));
            }
        }
        // SAFETY: the files are only read; a model folder must not be changed while the server runs (README).
        let tensors = unsafe { MmapedSafetensors::multi(&files) }.map_err(|error| {
            let names: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            Error::unprocessable(names.join(", "), format!("not a complete safetensors file: {error}"))
        })?;
        Ok(Folder { path: path.to_owned(), config, tensors })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.tensors.get(name).is_ok()
    }

    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors.tensors().into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        self.tensors
            .load(name, &Device::Cpu)
            .map_err(|error| Error::unprocessable(name, format!("tensor `{name}` of {}: {error}", self.path.display())))
    }

    pub(super) fn stored_dtype(&self) -> String {
        let mut counts = BTreeMap::new();
        for (_, view) in self.tensors.tensors() {
            *counts.entry(format!("{:?}", view.dtype())).or_insert(0usize) += view.data().len();
        }
        counts.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(dtype, _)| dtype).unwrap_or_default()
    }

    pub(super) fn generation_defaults(&self) -> GenerationDefaults {
        let Some(file) = optional_json(&self.path.join("generation_config.json")) else {
            return GenerationDefaults::default();
        };
        GenerationDefaults {
            temperature: file["temperature"].as_f64().map(|value| value as f32),
            top_p: file["top_p"].as_f64().map(|value| value as f32),
            top_k: file["top_k"].as_u64().map(|value| value as usize),
            repetition_penalty: file["repetition_penalty"].as_f64().map(|value| value as f32),
        }
    }

    pub(super) fn tokenizer(&self) -> Result<TokenizerOptions> {
        let file = self.path.join("tokenizer.json");
        let tokenizer_json = std::fs::read_to_string(&file).map_err(|error| {
            Error::unprocessable(file.display().to_string(), format!("cannot read the tokenizer: {error}"))
        })?;
        let settings = optional_json(&self.path.join("tokenizer_config.json")).unwrap_or(Value::Null);
        let special = optional_json(&self.path.join("special_tokens_map.json")).unwrap_or(Value::Null);
        let token = |key: &str| token_text(&settings[key]).or_else(|| token_text(&special[key]));
        let chat_template = std::fs::read_to_string(self.path.join("chat_template.jinja"))
            .ok()
            .or_else(|| template(&settings["chat_template"]));
        let eos_token = token("eos_token");
        let parsed: Value = serde_json::from_str(&tokenizer_json).map_err(|error| {
            Error::unprocessable(file.display().to_string(), format!("not a tokenizer.json: {error}"))
        })?;
        let mut eos_token_ids = Vec::new();
        let generation = optional_json(&self.path.join("generation_config.json")).unwrap_or(Value::Null);
        for source in [&generation["eos_token_id"], &self.config["eos_token_id"]] {
            match source {
                Value::Number(id) => eos_token_ids.extend(id.as_u64().map(|id| id as u32)),
                Value::Array(ids) => eos_token_ids.extend(ids.iter().filter_map(|id| id.as_u64().map(|id| id as u32))),
                _ => {}
            }
        }
        if let Some(text) = &eos_token {
            eos_token_ids.extend(added_token_id(&parsed, text));
        }
        if chat_template.as_deref().is_some_and(|template| template.contains("<|im_end|>")) {
            eos_token_ids.extend(added_token_id(&parsed, "<|im_end|>"));
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(TokenizerOptions {
            tokenizer_json,
            chat_template,
            bos_token: token("bos_token"),
            eos_token,
            pad_token: token("pad_token"),
            add_bos_token: settings["add_bos_token"].as_bool().unwrap_or(false),
            eos_token_ids,
        })
    }
}

/// The files that hold the tensors: one, or those the index names.
pub(super) fn shards(path: &Path) -> Result<Vec<PathBuf>> {
    let index = path.join("model.safetensors.index.json");
    if !index.is_file() {
        return Ok(vec![path.join("model.safetensors")]);
    }
    let map = read_json(&index)?;
    let Some(map) = map["weight_map"].as_object() else {
        return Err(Error::unprocessable(index.display().to_string(), "has no `weight_map`"));
    };
    let mut files: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    files.sort_unstable();
    files.dedup();
    if let Some(bad) = files.iter().find(|file| file.contains('/')) {
        return Err(Error::unprocessable(index.display().to_string(), format!("`{bad}` is not a file of the folder")));
    }
    Ok(files.into_iter().map(|file| path.join(file)).collect())
}

fn read_json(file: &Path) -> Result<Value> {
    let name = file.display().to_string();
    let text = std::fs::read_to_string(file).map_err(|error| Error::unprocessable(&name, error.to_string()))?;
    serde_json::from_str(&text).map_err(|error| Error::unprocessable(&name, format!("not valid JSON: {error}")))
}

fn optional_json(file: &Path) -> Option<Value> {
    serde_json::from_str(&std::fs::read_to_string(file).ok()?).ok()
}

/// A special token is a string or `{"content": …}`.
fn token_text(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// A template is a string or a list of named ones, of which `default` counts.
fn template(value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        return Some(text.to_owned());
    }
    let named = value.as_array()?;
    let default = named.iter().find(|entry| entry["name"] == "default").or(named.first())?;
    default["template"].as_str().map(str::to_owned)
}

fn added_token_id(tokenizer: &Value, text: &str) -> Option<u32> {
    let added = tokenizer["added_tokens"].as_array()?;
    added.iter().find(|token| token["content"] == text)?["id"].as_u64().map(|id| id as u32)
}
