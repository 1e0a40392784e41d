//! The vocabulary of a GGUF file as the text of a `tokenizer.json`.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value as Meta;
use serde_json::{Value, json};

use super::gguf::number;
use crate::error::{Error, Result};
use crate::text::TokenizerOptions;

const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// Words, digits in threes, punctuation, line ends: the split of Llama 3; Qwen's differs in its single digits.
const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

pub(super) fn build(metadata: &HashMap<String, Meta>) -> Result<TokenizerOptions> {
    let model = text(metadata, "tokenizer.ggml.model").unwrap_or_default();
    let tokens = strings(metadata, "tokenizer.ggml.tokens")?;
    let types: Vec<i64> = match metadata.get("tokenizer.ggml.token_type") {
        Some(Meta::Array(types)) => types.iter().map(|kind| number(kind).unwrap_or(1.0) as i64).collect(),
        _ => vec![1; tokens.len()],
    };
    let mut json = match model.as_str() {
        "gpt2" => byte_level(metadata, &tokens)?,
        "llama" => sentencepiece(metadata, &tokens)?,
        other => {
            return Err(Error::unprocessable(
                "tokenizer.ggml.model",
                format!("tokenizer `{other}` is not supported: `gpt2` and `llama` are"),
            ));
        }
    };
    json["version"] = json!("1.0");
    let added: Vec<Value> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| [CONTROL, USER_DEFINED].contains(kind))
        .map(|(id, (token, kind))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": *kind == CONTROL})
        })
        .collect();
    json["added_tokens"] = Value::Array(added);

    let id = |key: &str| metadata.get(key).and_then(number).map(|id| id as usize);
    let token = |key: &str| id(key).and_then(|id| tokens.get(id).cloned());
    let chat_template = text(metadata, "tokenizer.chat_template");
    let mut eos_token_ids: Vec<u32> =
        ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
            .iter()
            .filter_map(|key| id(key).map(|id| id as u32))
            .collect();
    // Ends of a turn that templates write: the file may name only the end of the text.
    for end in ["<|im_end|>", "<|eot_id|>", "<end_of_turn>"] {
        if chat_template.as_deref().is_some_and(|template| template.contains(end)) {
            eos_token_ids.extend(tokens.iter().position(|token| token == end).map(|id| id as u32));
        }
    }
    eos_token_ids.sort_unstable();
    eos_token_ids.dedup();
    Ok(TokenizerOptions {
        tokenizer_json: json.to_string(),
        chat_template,
        bos_token: token("tokenizer.ggml.bos_token_id"),
        eos_token: token("tokenizer.ggml.eos_token_id"),
        pad_token: token("tokenizer.ggml.padding_token_id"),
        // llama.cpp's defaults.
        add_bos_token: flag(metadata, "tokenizer.ggml.add_bos_token")
            .unwrap_or(model == "llama" || is_llama3(metadata)),
        eos_token_ids,
    })
}

fn byte_level(metadata: &HashMap<String, Meta>, tokens: &[String]) -> Result<Value> {
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            bytes(false),
        ]})
    };
    let pre = text(metadata, "tokenizer.ggml.pre").unwrap_or_else(|| "default".into());
    let pre_tokenizer = match pre.as_str() {
        "default" | "gpt-2" => bytes(true),
        "smollm" => {
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, bytes(true)]})
        }
        _ if is_llama3(metadata) => split(LLAMA3_SPLIT),
        "qwen2" => split(&LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
        other => {
            return Err(Error::unprocessable(
                "tokenizer.ggml.pre",
                format!("pre-tokenizer `{other}` is not supported: default, gpt-2, smollm, llama-bpe and qwen2 are"),
            ));
        }
    };
    let merges: Vec<Value> = strings(metadata, "tokenizer.ggml.merges")?
        .iter()
        .filter_map(|merge| merge.split_once(' ').map(|(left, right)| json!([left, right])))
        .collect();
    let normalizer = if pre == "qwen2" { json!({"type": "NFC"}) } else { Value::Null };
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": bytes(true),
        "model": {"type": "BPE", "vocab": vocab(tokens), "merges": merges, "byte_fallback": false, "fuse_unk": false,
            // A word of the vocabulary is one token, whether merges lead to it or not.
            "ignore_merges": is_llama3(metadata)},
    }))
}

fn is_llama3(metadata: &HashMap<String, Meta>) -> bool {
    text(metadata, "tokenizer.ggml.pre").is_some_and(|pre| ["llama-bpe", "llama3", "llama-v3"].contains(&pre.as_str()))
}

/// Sentencepiece BPE: the merges are not stored; every split of a piece into two pieces is one, the best-scored piece first.
fn sentencepiece(metadata: &HashMap<String, Meta>, tokens: &[String]) -> Result<Value> {
    let Some(Meta::Array(scores)) = metadata.get("tokenizer.ggml.scores") else {
        return Err(Error::unprocessable("tokenizer.ggml.scores", "is missing"));
    };
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    let mut merges = Vec::new();
    for (token, score) in tokens.iter().zip(scores) {
        let score = number(score).unwrap_or(0.0);
        let mut splits: Vec<(usize, usize)> = token
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| Some((*ids.get(&token[..at])?, *ids.get(&token[at..])?)))
            .collect();
        splits.sort_unstable();
        merges.extend(splits.into_iter().map(|(left, right)| (score, left, right)));
    }
    merges.sort_by(|a, b| {
        let lengths = |merge: &(f64, usize, usize)| (tokens[merge.1].chars().count(), tokens[merge.2].chars().count());
        b.0.total_cmp(&a.0).then_with(|| lengths(b).cmp(&lengths(a)))
    });
    let merges: Vec<Value> = merges.into_iter().map(|(_, left, right)| json!([tokens[left], tokens[right]])).collect();
    let prefix = flag(metadata, "tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    let normalizer = if prefix {
        json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, space]})
    } else {
        space
    };
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = metadata.get("tokenizer.ggml.unknown_token_id").and_then(number).map_or(0, |id| id as usize);
    Ok(json!({
        "normalizer": normalizer,
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "vocab": vocab(tokens), "merges": merges, "byte_fallback": true, "fuse_unk": true,
            "unk_token": tokens.get(unknown)},
    }))
}

fn vocab(tokens: &[String]) -> Value {
    Value::Object(tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect())
}

fn text(metadata: &HashMap<String, Meta>, key: &str) -> Option<String> {
    metadata.get(key).and_then(|value| value.to_string().ok()).cloned()
}

fn flag(metadata: &HashMap<String, Meta>, key: &str) -> Option<bool> {
    metadata.get(key).and_then(|value| value.to_bool().ok())
}

fn strings(metadata: &HashMap<String, Meta>, key: &str) -> Result<Vec<String>> {
    let Some(Meta::Array(values)) = metadata.get(key) else {
        return Err(Error::unprocessable(key, format!("metadata key `{key}` is missing")));
    };
    values.iter().map(|value| Ok(value.to_string()?.clone())).collect()
}
