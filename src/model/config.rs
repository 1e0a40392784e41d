//! What a checkpoint's `config.json` says, as flags of the one decoder.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::ops::Activation;

/// Native architectures; each is a set of flags in [`ModelConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama, SmolLM2, Mistral.
    Llama,
    /// Qwen2 and Qwen2.5: bias on q, k, v.
    Qwen2,
    /// Qwen3: RMS norm on each head's q and k.
    Qwen3,
    /// Gemma 3 text.
    Gemma3,
}

/// Frequency scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Positions divided by `factor`.
    Linear {
        /// Divisor.
        factor: f64,
    },
    /// Llama 3's banded scaling.
    Llama3 {
        /// Divisor of the low band.
        factor: f64,
        /// Low band border.
        low_freq_factor: f64,
        /// High band border.
        high_freq_factor: f64,
        /// Context the model was first trained with, tokens.
        original_context: usize,
    },
}

/// Shape and flags of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which family it is.
    pub architecture: Architecture,
    /// V, tokens.
    pub vocab_size: usize,
    /// C.
    pub hidden_size: usize,
    /// F.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// H.
    pub num_attention_heads: usize,
    /// K.
    pub num_key_value_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Added under the root of every RMS norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies (of global layers, where layers differ).
    pub rope_theta: f64,
    /// Base of the rotary frequencies of sliding layers, where it differs.
    pub rope_local_theta: Option<f64>,
    /// Rotary scaling (of global layers, where layers differ).
    pub rope_scaling: Option<RopeScaling>,
    /// Longest context, tokens.
    pub max_position_embeddings: usize,
    /// The head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Bias on q, k, v projections.
    pub qkv_bias: bool,
    /// Bias on the o projection.
    pub o_bias: bool,
    /// RMS norm over each head of q and k.
    pub qk_norm: bool,
    /// Gemma: norms after attention and MLP too, `(1 + w)` weights, embedding scaled by √C.
    pub gemma_norms: bool,
    /// The gate's activation.
    pub activation: Activation,
    /// Softmax scale; `1/√D` unless the checkpoint says otherwise.
    pub attention_scale: f32,
    /// Sliding window in tokens, for the layers where `is_sliding` holds.
    pub sliding_window: Option<usize>,
    /// Per layer: attends within the sliding window only.
    pub is_sliding: Vec<bool>,
    /// Labels of a sequence-classification head; 0 for a language model.
    pub num_labels: usize,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json` (a GGUF file's metadata arrives in the same shape), in the spelling of transformers 4 and
    /// of transformers 5. What this decoder cannot compute faithfully is a 422 naming the key.
    pub fn from_json(config: &Value) -> Result<Self> {
        let outer = Keys { keys: config };
        let (family, is_classifier) = family(&outer)?;
        let keys = if config["text_config"].is_object() { Keys { keys: &config["text_config"] } } else { outer };
        let gemma = family == Family::Gemma3;
        keys.refuse_unsupported(&outer)?;

        let hidden_size = keys.size("hidden_size", None)?;
        let num_hidden_layers = keys.size("num_hidden_layers", None)?;
        let num_attention_heads = keys.size("num_attention_heads", gemma.then_some(8))?;
        let num_key_value_heads =
            keys.size("num_key_value_heads", Some(if gemma { 4 } else { num_attention_heads }))?;
        let head_dim = match family {
            Family::Gemma3 => Some(256),
            Family::Qwen3 => Some(128),
            _ => (num_attention_heads > 0).then(|| hidden_size / num_attention_heads),
        };
        let head_dim = keys.size("head_dim", head_dim)?;
        let max_position_embeddings = keys.size("max_position_embeddings", Some(if gemma { 131_072 } else { 2048 }))?;
        if num_attention_heads % num_key_value_heads != 0 {
            return Err(keys.bad("num_key_value_heads", "must divide num_attention_heads"));
        }
        if head_dim % 2 != 0 {
            return Err(keys.bad("head_dim", "must be even for the rotary embedding"));
        }

        let (activation_key, usual) =
            if gemma { ("hidden_activation", "gelu_pytorch_tanh") } else { ("hidden_act", "silu") };
        let activation = match keys.text(activation_key).unwrap_or(usual) {
            "silu" | "swish" => Activation::Silu,
            "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
            _ => return Err(keys.bad(activation_key, "is not supported: only silu and gelu_pytorch_tanh are")),
        };

        let rope = keys.rope(gemma, max_position_embeddings)?;
        let (sliding_window, is_sliding) = keys.sliding(family, num_hidden_layers)?;
        let attention_bias = keys.flag("attention_bias", false);
        let query_scale = if gemma { keys.number("query_pre_attn_scalar", Some(256.0))? } else { head_dim as f64 };
        if query_scale <= 0.0 {
            return Err(keys.bad("query_pre_attn_scalar", "must be above zero"));
        }
        let rms_norm_eps = keys.number("rms_norm_eps", Some(1e-6))?;
        if rms_norm_eps < 0.0 {
            return Err(keys.bad("rms_norm_eps", "must not be below zero"));
        }
        Ok(ModelConfig {
            architecture: match family {
                Family::Llama | Family::Mistral => Architecture::Llama,
                Family::Qwen2 => Architecture::Qwen2,
                Family::Qwen3 => Architecture::Qwen3,
                Family::Gemma3 => Architecture::Gemma3,
            },
            vocab_size: keys.size("vocab_size", gemma.then_some(262_208))?,
            hidden_size,
            intermediate_size: keys.size("intermediate_size", None)?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps,
            rope_theta: rope.theta,
            rope_local_theta: rope.local_theta,
            rope_scaling: rope.scaling,
            max_position_embeddings,
            tie_word_embeddings: keys.flag("tie_word_embeddings", outer.flag("tie_word_embeddings", gemma)),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            o_bias: attention_bias,
            qk_norm: matches!(family, Family::Qwen3 | Family::Gemma3),
            gemma_norms: gemma,
            activation,
            attention_scale: (1.0 / query_scale.sqrt()) as f32,
            sliding_window,
            is_sliding,
            num_labels: if is_classifier { outer.labels()? } else { 0 },
        })
    }
}

/// The spellings of `architectures`; Mistral is a Llama whose window is on in every layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
    Gemma3,
}

/// The family, and whether the head is a sequence classifier's.
fn family(keys: &Keys<'_>) -> Result<(Family, bool)> {
    let refused = |key: &str, name: &str| {
        Error::unprocessable(
            key,
            format!(
                "{key}: `{name}` is not supported. The native backend loads Llama, Mistral, Qwen2, Qwen3 and Gemma 3 text models \
                 (…ForCausalLM, …ForSequenceClassification)."
            ),
        )
    };
    let Some(architecture) = keys.keys["architectures"][0].as_str() else {
        let name = keys.text("model_type").ok_or_else(|| keys.bad("architectures", "is missing"))?;
        let family = match name {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "gemma3" | "gemma3_text" => Family::Gemma3,
            _ => return Err(refused("model_type", name)),
        };
        return Ok((family, false));
    };
    let (name, head) = architecture.split_once("For").unwrap_or((architecture, ""));
    let family = match name {
        "Llama" => Family::Llama,
        "Mistral" => Family::Mistral,
        "Qwen2" => Family::Qwen2,
        "Qwen3" => Family::Qwen3,
        "Gemma3" | "Gemma3Text" => Family::Gemma3,
        _ => return Err(refused("architectures", architecture)),
    };
    match head {
        "CausalLM" => Ok((family, false)),
        "ConditionalGeneration" if family == Family::Gemma3 => Ok((family, false)),
        "SequenceClassification" => Ok((family, true)),
        _ => Err(refused("architectures", architecture)),
    }
}

struct Rope {
    theta: f64,
    local_theta: Option<f64>,
    scaling: Option<RopeScaling>,
}

/// The keys of one `config.json`; null counts as absent.
#[derive(Clone, Copy)]
struct Keys<'a> {
    keys: &'a Value,
}

impl<'a> Keys<'a> {
    fn bad(&self, key: &str, what: &str) -> Error {
        let value = match self.keys.pointer(&format!("/{}", key.replace('.', "/"))) {
            Some(value) if !value.is_null() => format!(" (it is {value})"),
            _ => String::new(),
        };
        Error::unprocessable(key, format!("The model's configuration cannot be used: `{key}` {what}{value}."))
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.keys[key].as_str()
    }

    fn flag(&self, key: &str, default: bool) -> bool {
        self.keys[key].as_bool().unwrap_or(default)
    }

    fn size(&self, key: &str, default: Option<usize>) -> Result<usize> {
        // Far above any model there is, and low enough that no product of two sizes overflows.
        const LARGEST: u64 = 1 << 28;
        match (&self.keys[key], default) {
            (Value::Null, Some(default)) if default > 0 => Ok(default),
            (Value::Null, _) => Err(self.bad(key, "is missing")),
            (value, _) => match value.as_u64() {
                Some(size @ 1..=LARGEST) => Ok(size as usize),
                _ => Err(self.bad(key, "must be a whole number above zero")),
            },
        }
    }

    fn number(&self, key: &str, default: Option<f64>) -> Result<f64> {
        match (&self.keys[key], default) {
            (Value::Null, Some(default)) => Ok(default),
            (Value::Null, None) => Err(self.bad(key, "is missing")),
            (value, _) => {
                value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.bad(key, "must be a number"))
            }
        }
    }

    /// `num_labels`, or the number of names in `id2label`; transformers writes one or the other.
    fn labels(&self) -> Result<usize> {
        match self.keys["id2label"].as_object() {
            Some(names) => self.size("num_labels", Some(names.len())),
            None => self.size("num_labels", Some(2)),
        }
    }

    fn refuse_unsupported(&self, outer: &Keys<'_>) -> Result<()> {
        for key in ["final_logit_softcapping", "attn_logit_softcapping"] {
            if !self.keys[key].is_null() {
                return Err(self.bad(key, "is not supported"));
            }
        }
        for key in ["mlp_bias", "use_bidirectional_attention"] {
            if self.flag(key, false) {
                return Err(self.bad(key, "is not supported"));
            }
        }
        if self.number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(self.bad("partial_rotary_factor", "is not supported: the whole head is rotated"));
        }
        if !outer.keys["quantization_config"].is_null() {
            return Err(Error::unprocessable(
                "quantization_config",
                "`quantization_config`: quantized Hugging Face folders are not read. Use the full-precision folder or a GGUF file.",
            ));
        }
        Ok(())
    }

    /// Bases and scaling, from `rope_parameters` (transformers 5; per layer type where those differ) or from `rope_theta`,
    /// `rope_local_base_freq` and `rope_scaling`.
    fn rope(&self, gemma: bool, context: usize) -> Result<Rope> {
        let default_theta = if gemma { 1e6 } else { 1e4 };
        let parameters = &self.keys["rope_parameters"];
        let rope = if parameters.is_null() {
            Rope {
                theta: self.number("rope_theta", Some(default_theta))?,
                local_theta: if gemma { Some(self.number("rope_local_base_freq", Some(1e4))?) } else { None },
                scaling: self.rope_scaling("rope_scaling", context)?,
            }
        } else if gemma {
            let local = "rope_parameters.sliding_attention";
            if self.rope_scaling(local, context)?.is_some() {
                return Err(self.bad(&format!("{local}.rope_type"), "must be default"));
            }
            let full = "rope_parameters.full_attention";
            let (theta, local_theta) =
                (self.number("rope_theta", Some(default_theta))?, self.number("rope_local_base_freq", Some(1e4))?);
            Rope {
                theta: self.sub(full).number("rope_theta", Some(theta))?,
                local_theta: Some(self.sub(local).number("rope_theta", Some(local_theta))?),
                scaling: self.rope_scaling(full, context)?,
            }
        } else {
            let all = self.sub("rope_parameters");
            if all.keys.get("full_attention").is_some() {
                return Err(self.bad("rope_parameters", "differs by layer type, which only Gemma 3 may"));
            }
            Rope {
                theta: all.number("rope_theta", Some(self.number("rope_theta", Some(default_theta))?))?,
                local_theta: None,
                scaling: self.rope_scaling("rope_parameters", context)?,
            }
        };
        // transformers lets the old spelling win where a file has both.
        let new = self.sub(if gemma { "rope_parameters.full_attention" } else { "rope_parameters" });
        let old = self.keys["rope_scaling"].as_object().filter(|_| !parameters.is_null());
        if old.is_some_and(|old| old.iter().any(|(key, value)| new.keys.get(key) != Some(value))) {
            return Err(self.bad("rope_scaling", "is not supported beside a `rope_parameters` that says otherwise"));
        }
        if rope.theta <= 0.0 || rope.local_theta.is_some_and(|theta| theta <= 0.0) {
            return Err(self.bad("rope_theta", "must be above zero"));
        }
        Ok(rope)
    }

    fn sub(&self, path: &str) -> Keys<'a> {
        const ABSENT: &Value = &Value::Null;
        Keys { keys: self.keys.pointer(&format!("/{}", path.replace('.', "/"))).unwrap_or(ABSENT) }
    }

    fn rope_scaling(&self, path: &str, context: usize) -> Result<Option<RopeScaling>> {
        let keys = self.sub(path);
        let Some((key, kind)) =
            keys.text("rope_type").map(|kind| ("rope_type", kind)).or(keys.text("type").map(|kind| ("type", kind)))
        else {
            return Ok(None);
        };
        let positive = |key: &str| match keys.number(key, None) {
            Ok(number) if number > 0.0 => Ok(number),
            _ => Err(self.bad(&format!("{path}.{key}"), "must be a number above zero")),
        };
        match kind {
            "default" => Ok(None),
            "linear" => Ok(Some(RopeScaling::Linear { factor: positive("factor")? })),
            "llama3" => {
                let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
                if low >= high {
                    return Err(self.bad(&format!("{path}.high_freq_factor"), "must be above low_freq_factor"));
                }
                Ok(Some(RopeScaling::Llama3 {
                    factor: positive("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_context: keys.size("original_max_position_embeddings", Some(context))?,
                }))
            }
            _ => Err(self.bad(&format!("{path}.{key}"), "is not supported: only default, linear and llama3 are")),
        }
    }

    /// The window, and which layers keep to it.
    fn sliding(&self, family: Family, layers: usize) -> Result<(Option<usize>, Vec<bool>)> {
        let window = match family {
            Family::Llama => None,
            Family::Qwen2 | Family::Qwen3 if !self.flag("use_sliding_window", false) => None,
            // A present null turns Mistral's window off; absence is transformers' default.
            _ if self.keys.get("sliding_window").is_some_and(Value::is_null) => None,
            _ => Some(self.size("sliding_window", Some(4096))?),
        };
        if window.is_none() {
            return Ok((None, vec![false; layers]));
        }
        let listed = &self.keys["layer_types"];
        let is_sliding = match (family, listed) {
            (_, Value::Array(types)) => {
                let is_sliding = types.iter().map(|kind| match kind.as_str() {
                    Some("sliding_attention") => Ok(true),
                    Some("full_attention") => Ok(false),
                    _ => Err(self.bad("layer_types", "may hold only sliding_attention and full_attention")),
                });
                let is_sliding = is_sliding.collect::<Result<Vec<_>>>()?;
                if is_sliding.len() != layers {
                    return Err(self.bad("layer_types", "must have one entry per layer"));
                }
                is_sliding
            }
            (Family::Llama | Family::Mistral, _) => vec![true; layers],
            (Family::Gemma3, _) => {
                let every = self.size("sliding_window_pattern", Some(6))?;
                (0..layers).map(|layer| (layer + 1) % every != 0).collect()
            }
            (Family::Qwen2 | Family::Qwen3, _) => {
                let full = self.keys["max_window_layers"].as_u64().unwrap_or(28) as usize;
                (0..layers).map(|layer| layer >= full).collect()
            }
        };
        Ok((window, is_sliding))
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
