//! GGUF files: tensor names, layouts and metadata turned into Hugging Face's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value as Meta};
use candle_core::{Device, Tensor};
use memmap2::Mmap;
use serde_json::{Value, json};

use super::blocks::Blocks;
use super::gguf_tokenizer;
use crate::error::{Error, Result};
use crate::text::TokenizerOptions;

pub(super) struct Gguf {
    path: PathBuf,
    map: Mmap,
    content: Content,
    /// Hugging Face name → GGUF name.
    names: BTreeMap<String, String>,
    architecture: String,
}

/// Per-layer names: GGUF's part and Hugging Face's.
const LAYER_NAMES: [(&str, &str); 14] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
    ("pre_ffw_norm", "pre_feedforward_layernorm"),
];

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let fail =
            |error: &dyn std::fmt::Display| Error::unprocessable(&name, format!("not a readable GGUF file: {error}"));
        let file = File::open(path).map_err(|error| fail(&error))?;
        // SAFETY: the file is only read; a model file must not be changed while the server runs (README).
        let map = unsafe { Mmap::map(&file) }.map_err(|error| fail(&error))?;
        let content = read_header(&map).map_err(|error| fail(&error))?;
        for (tensor, info) in &content.tensor_infos {
            // More elements than 64 bits count are in no file.
            let elements = info.shape.dims().iter().try_fold(1u64, |product, dim| product.checked_mul(*dim as u64));
            let (elements, block) = (elements.unwrap_or(u64::MAX), info.ggml_dtype.block_size() as u64);
            let size = (elements / block).saturating_mul(info.ggml_dtype.type_size() as u64);
            let end = content.tensor_data_offset.saturating_add(info.offset).saturating_add(size);
            if elements % block != 0 || end > map.len() as u64 {
                return Err(Error::unprocessable(
                    &name,
                    format!("the file is truncated: tensor `{tensor}` ends at byte {end}, the file has {}", map.len()),
                ));
            }
        }
        let architecture = match content.metadata.get("general.architecture") {
            Some(Meta::String(architecture)) => architecture.clone(),
            _ => return Err(Error::unprocessable(&name, "`general.architecture` is missing")),
        };
        let names = content
            .tensor_infos
            .keys()
            .filter_map(|gguf| Some((hf_name(gguf, architecture == "gemma3")?, gguf.clone())))
            .collect();
        Ok(Gguf { path: path.to_owned(), map, content, names, architecture })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.names.contains_key(name)
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    pub(super) fn get(&self, name: &str) -> Result<Tensor> {
        let fail =
            |text: String| Error::unprocessable(name, format!("tensor `{name}` of {}: {text}", self.path.display()));
        let gguf_name = self.names.get(name).ok_or_else(|| fail("is missing".into()))?;
        let mut reader = Cursor::new(&self.map[..]);
        let quantized =
            self.content.tensor(&mut reader, gguf_name, &Device::Cpu).map_err(|error| fail(error.to_string()))?;
        let tensor = quantized.dequantize(&Device::Cpu)?;
        if let Some(heads) = self.permuted(name, tensor.dim(0)?)? {
            return unpermute(&tensor, heads);
        }
        if self.architecture == "gemma3" && name.ends_with("norm.weight") {
            // GGUF stores 1 + w, Hugging Face w.
            return Ok((tensor - 1.0)?);
        }
        Ok(tensor)
    }

    /// The codes of a quantized matrix, in Hugging Face's order of rows.
    pub(super) fn blocks(&self, name: &str) -> Result<Option<Blocks>> {
        let Some(info) = self.names.get(name).and_then(|gguf| self.content.tensor_infos.get(gguf)) else {
            return Ok(None);
        };
        let Ok((rows, columns)) = info.shape.dims2() else { return Ok(None) };
        let kind = info.ggml_dtype;
        if columns % kind.block_size() != 0 {
            let text = format!("tensor `{name}` of {} has rows that are no whole blocks", self.path.display());
            return Err(Error::unprocessable(name, text));
        }
        let start = (self.content.tensor_data_offset + info.offset) as usize;
        let bytes = &self.map[start..start + rows * columns / kind.block_size() * kind.type_size()];
        let blocks = Blocks::new(kind, bytes, rows, columns);
        Ok(match self.permuted(name, rows)? {
            Some(heads) => blocks.map(|blocks| {
                // Row (h, i, p) of (h, 2, d/2) is row (h, p, i) of (h, d/2, 2).
                let (head, half) = (rows / heads, rows / heads / 2);
                blocks.reordered(|row| row / head * head + row % half * 2 + row % head / half)
            }),
            None => blocks,
        })
    }

    /// Heads of a matrix whose rows GGUF has in another order.
    fn permuted(&self, name: &str, rows: usize) -> Result<Option<usize>> {
        if self.architecture != "llama" {
            return Ok(None);
        }
        let key = match name {
            _ if name.contains("self_attn.q_proj") => "attention.head_count",
            _ if name.contains("self_attn.k_proj") => "attention.head_count_kv",
            _ => return Ok(None),
        };
        // A file of equally many heads of both kinds need not say so twice.
        let heads = self.number(key).or_else(|| self.number("attention.head_count"));
        let Some(heads) = heads.map(|heads| heads as usize) else { return Ok(None) };
        if heads == 0 || !rows.is_multiple_of(heads.saturating_mul(2)) {
            let message =
                format!("tensor `{name}` of {} has {rows} rows, which are no {heads} heads", self.path.display());
            return Err(Error::unprocessable(name, message));
        }
        Ok(Some(heads))
    }

    pub(super) fn stored_dtype(&self) -> String {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for (name, info) in &self.content.tensor_infos {
            if name != "token_embd.weight" {
                *counts.entry(dtype_name(info.ggml_dtype)).or_default() += info.shape.elem_count();
            }
        }
        counts.into_iter().max_by_key(|(_, elements)| *elements).map(|(name, _)| name).unwrap_or_default()
    }

    pub(super) fn tokenizer(&self) -> Result<TokenizerOptions> {
        gguf_tokenizer::build(&self.content.metadata).map_err(|error| error.context(self.path.display()))
    }

    /// `<architecture>.<key>` as a number.
    fn number(&self, key: &str) -> Option<f64> {
        number(self.content.metadata.get(&format!("{}.{key}", self.architecture))?)
    }

    fn required(&self, key: &str) -> Result<f64> {
        self.number(key).ok_or_else(|| {
            Error::unprocessable(
                self.path.display().to_string(),
                format!("metadata key `{}.{key}` is missing or not a number", self.architecture),
            )
        })
    }

    /// The metadata in the shape of `config.json`.
    pub(super) fn config(&self) -> Result<Value> {
        if !["llama", "qwen2", "qwen3", "gemma3"].contains(&self.architecture.as_str()) {
            return Err(Error::unprocessable(
                self.path.display().to_string(),
                format!(
                    "architecture `{}` is not served natively: llama, qwen2, qwen3 and gemma3 are",
                    self.architecture
                ),
            ));
        }
        self.check_tensors()?;
        let heads = self.required("attention.head_count")? as u64;
        let hidden = self.required("embedding_length")? as u64;
        let layers = self.required("block_count")? as u64;
        let head_dim = self
            .number("attention.key_length")
            .or_else(|| self.number("rope.dimension_count"))
            .map_or(hidden / heads.max(1), |value| value as u64);
        let embedding = self.content.tensor_infos.get("token_embd.weight").ok_or_else(|| {
            Error::unprocessable(self.path.display().to_string(), "tensor `token_embd.weight` is missing")
        })?;
        let (class, model_type) = match self.architecture.as_str() {
            "llama" => ("LlamaForCausalLM", "llama"),
            "qwen2" => ("Qwen2ForCausalLM", "qwen2"),
            "qwen3" => ("Qwen3ForCausalLM", "qwen3"),
            _ => ("Gemma3ForCausalLM", "gemma3_text"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": model_type,
            "vocab_size": embedding.shape.dims().first().copied().unwrap_or(0),
            "hidden_size": hidden,
            "intermediate_size": self.required("feed_forward_length")? as u64,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.number("attention.head_count_kv").map_or(heads, |value| value as u64),
            "head_dim": head_dim,
            // Stored as f32; the shortest decimal of that f32 is what the model was made with.
            "rms_norm_eps": shortest(self.required("attention.layer_norm_rms_epsilon")?),
            "rope_theta": self.number("rope.freq_base").unwrap_or(10000.0),
            "max_position_embeddings": self.required("context_length")? as u64,
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
            // Qwen 2 has them without a word; of the others the query's stands for all four.
            "attention_bias": self.architecture != "qwen2" && self.content.tensor_infos.contains_key("blk.0.attn_q.bias"),
        });
        let fields = config.as_object_mut().expect("built as an object above. This is a bug.");
        // Files older than the type's key scale linearly. The configuration refuses what it cannot compute.
        let kind = self.content.metadata.get(&format!("{}.rope.scaling.type", self.architecture));
        let kind = kind.and_then(|kind| kind.to_string().ok()).map_or("linear", String::as_str);
        let factor = self.number("rope.scaling.factor").or_else(|| self.number("rope.scale_linear"));
        let scaling = factor.filter(|factor| *factor != 1.0 && kind != "none");
        if let Some(factor) = scaling {
            fields.insert("rope_scaling".into(), json!({"rope_type": kind, "factor": factor}));
        }
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            let theta = fields["rope_theta"].as_f64().unwrap_or_default();
            fields.insert("rope_scaling".into(), self.llama3_scaling(head_dim, theta)?);
        }
        for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
            if let Some(cap) = self.number(key).filter(|cap| *cap != 0.0) {
                fields.insert(key.into(), json!(cap));
            }
        }
        if self.architecture == "gemma3" {
            let key = "gemma3.attention.sliding_window_pattern";
            let pattern = match self.content.metadata.get(key) {
                None => 6,
                Some(value) => number(value).map(|pattern| (pattern as u64).max(1)).ok_or_else(|| {
                    Error::unprocessable(key, format!("metadata key `{key}` is not supported: it is not a number"))
                })?,
            };
            let kinds: Vec<&str> = (0..layers)
                .map(|layer| if (layer + 1) % pattern == 0 { "full_attention" } else { "sliding_attention" })
                .collect();
            fields.insert("layer_types".into(), json!(kinds));
            fields.insert("sliding_window".into(), json!(self.required("attention.sliding_window")? as u64));
            fields.insert("rope_local_base_freq".into(), json!(self.number("rope.freq_base_swa").unwrap_or(10000.0)));
            // 27B alone scales by its hidden size a head; every other size by the head dimension.
            let scalar = if layers == 62 { hidden / heads.max(1) } else { head_dim };
            fields.insert("query_pre_attn_scalar".into(), json!(scalar));
            fields.insert("hidden_activation".into(), json!("gelu_pytorch_tanh"));
        }
        Ok(config)
    }

    /// A tensor of a layer that the decoder would not read changes what the model says.
    fn check_tensors(&self) -> Result<()> {
        for name in self.content.tensor_infos.keys() {
            let Some((part, kind)) =
                name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')?.1.rsplit_once('.'))
            else {
                continue;
            };
            let is_read = match kind {
                // Rotary frequencies of old converters, which follow from the metadata.
                "weight" => hf_name(name, self.architecture == "gemma3").is_some() || part == "attn_rot_embd",
                "bias" => {
                    matches!(part, "attn_q" | "attn_k" | "attn_v")
                        || (part == "attn_output" && self.architecture != "qwen2")
                }
                _ => false,
            };
            if !is_read {
                let text = format!(
                    "tensor `{name}` of {} is not supported: the model would be computed without it",
                    self.path.display()
                );
                return Err(Error::unprocessable(name, text));
            }
        }
        Ok(())
    }

    /// Llama 3's scaling, read back from the factors the converter wrote (it keeps no parameters): the family's own constants
    /// with the largest factor, which have to give what the file holds.
    fn llama3_scaling(&self, head_dim: u64, theta: f64) -> Result<Value> {
        let quantized = self.content.tensor(&mut Cursor::new(&self.map[..]), "rope_freqs.weight", &Device::Cpu)?;
        let factors = quantized.dequantize(&Device::Cpu)?.to_vec1::<f32>()?;
        if factors.len() as u64 != head_dim / 2 {
            return Err(Error::unprocessable("rope_freqs.weight", "has another length than half the head dimension"));
        }
        let factor = factors.iter().copied().fold(1.0f32, f32::max);
        for (index, given) in factors.iter().enumerate() {
            // Turns in the original context: 1 and fewer are stretched, 4 and more are not.
            let turns = 8192.0 * theta.powf(-2.0 * index as f64 / head_dim as f64) / std::f64::consts::TAU;
            let smooth = ((turns - 1.0) / 3.0).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - smooth) / f64::from(factor) + smooth);
            if (f64::from(*given) / expected - 1.0).abs() > 1e-3 {
                let text = format!(
                    "factor {index} is {given} where Llama 3.1's scaling has {expected}: others are not supported"
                );
                return Err(Error::unprocessable("rope_freqs.weight", text));
            }
        }
        Ok(json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}))
    }
}

/// candle divides by the alignment that a file gives.
fn read_header(map: &[u8]) -> candle_core::Result<Content> {
    let read = || Content::read(&mut Cursor::new(map));
    std::panic::catch_unwind(read).unwrap_or_else(|_| candle_core::bail!("its header makes no sense"))
}

fn hf_name(gguf: &str, gemma: bool) -> Option<String> {
    match gguf {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    // Gemma has four norms a layer; its `ffn_norm` stands before the MLP.
    let part = if gemma && part == "ffn_norm" { "pre_ffw_norm" } else { part };
    let (_, hf) = LAYER_NAMES.iter().find(|(name, _)| *name == part)?;
    Some(format!("model.layers.{layer}.{hf}.{kind}"))
}

/// GGUF interleaves the two rotary halves of each head of q and k: rows (h, d/2, 2) back to (h, 2, d/2).
fn unpermute(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let rows = tensor.dim(0)?;
    let rest: usize = tensor.dims()[1..].iter().product();
    let half = rows / heads / 2;
    Ok(tensor.reshape((heads, half, 2, rest))?.transpose(1, 2)?.contiguous()?.reshape(tensor.dims())?)
}

pub(super) fn number(value: &Meta) -> Option<f64> {
    match *value {
        Meta::U8(value) => Some(f64::from(value)),
        Meta::I8(value) => Some(f64::from(value)),
        Meta::U16(value) => Some(f64::from(value)),
        Meta::I16(value) => Some(f64::from(value)),
        Meta::U32(value) => Some(f64::from(value)),
        // Token types come as these; candle's own `to_i64` takes no narrower integer.
        Meta::I32(value) => Some(f64::from(value)),
        Meta::U64(value) => Some(value as f64),
        Meta::I64(value) => Some(value as f64),
        Meta::F32(value) => Some(f64::from(value)),
        Meta::F64(value) => Some(value),
        Meta::Bool(value) => Some(f64::from(u8::from(value))),
        Meta::String(_) | Meta::Array(_) => None,
    }
}

/// The f64 whose decimal digits are the shortest that name the same f32.
fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

fn dtype_name(dtype: GgmlDType) -> String {
    let name = format!("{dtype:?}");
    match name.strip_prefix('Q') {
        Some(rest) if rest.ends_with('K') => format!("Q{}_K", &rest[..rest.len() - 1]),
        Some(rest) if rest.len() == 2 => format!("Q{}_{}", &rest[..1], &rest[1..]),
        _ => name,
    }
}
