//! One decoder layer: attention and gated MLP, with the norms its architecture puts around them.

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};

use super::lora::SITES;
use super::{Attend, LoadOptions, LoraRows, ModelConfig, Rotary, WeightFormat};
use crate::error::Result;
use crate::ops::{
    Codes, FrozenLinear, add, causal_attention, gated, kv_write, only_added, paged_attention, reshape, rms_norm, rope,
};
use crate::weights::{Blocks, Checkpoint};

/// Where in [`SITES`] each linear is.
const Q: usize = 0;
const K: usize = 1;
const V: usize = 2;
const O: usize = 3;
const GATE: usize = 4;
const UP: usize = 5;
const DOWN: usize = 6;

/// Input and output features of the linear at a site.
pub(crate) fn site_shape(config: &ModelConfig, site: usize) -> (usize, usize) {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let queries = config.num_attention_heads * config.head_dim;
    let keys = config.num_key_value_heads * config.head_dim;
    match site {
        Q => (hidden, queries),
        K | V => (hidden, keys),
        O => (queries, hidden),
        GATE | UP => (hidden, inner),
        _ => (inner, hidden),
    }
}

/// `self_attn.q_proj` and so on.
pub(crate) fn site_path(site: usize) -> String {
    let block = if site <= O { "self_attn" } else { "mlp" };
    format!("{block}.{}", SITES[site])
}

/// Sites of a layer's attention (block 0) and of its MLP (block 1).
pub(crate) fn block_sites(block: usize) -> Range<usize> {
    if block == 0 { Q..GATE } else { GATE..SITES.len() }
}

/// Layer and site of the linears that come after a site's and those of the same input.
pub(crate) fn sites_after(layer: usize, site: usize) -> impl Iterator<Item = (usize, usize)> {
    let (layer, sites) = match site {
        Q | K | V => (layer, O..GATE),
        O => (layer, GATE..DOWN),
        GATE | UP => (layer, DOWN..SITES.len()),
        _ => (layer + 1, Q..O),
    };
    sites.map(move |site| (layer, site))
}

/// Reads a checkpoint's tensors in the dtypes the decoder computes with.
pub(crate) struct Reader<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) config: &'a ModelConfig,
    pub(crate) options: &'a LoadOptions,
    /// What stands before `layers.0` in the checkpoint's names.
    pub(crate) prefix: &'a str,
}

impl Reader<'_> {
    /// A linear `(out, in)`, named from the checkpoint's root.
    pub(crate) fn linear(&self, path: &str, out: usize, input: usize, bias: bool) -> Result<FrozenLinear> {
        let LoadOptions { device, weights } = self.options;
        let name = format!("{path}.weight");
        let bias = match bias {
            true => Some(self.checkpoint.get(&format!("{path}.bias"), &[out], self.options.compute_dtype(), device)?),
            false => None,
        };
        if device.is_cpu()
            && let Some(blocks) = self.blocks(&name, out, input, *weights)?
        {
            let Blocks { four_bits, group, codes, scales, offsets, .. } = blocks;
            let codes = Codes { four_bits, group, codes, scales, offsets };
            return FrozenLinear::from_codes(codes, (out, input), bias.as_ref());
        }
        let weight = self.checkpoint.get(&name, &[out, input], self.options.float_dtype(), device)?;
        FrozenLinear::new(&weight, bias.as_ref())
    }

    /// The codes to hold a matrix as, if it is to be held so.
    fn blocks(&self, name: &str, out: usize, input: usize, weights: WeightFormat) -> Result<Option<Blocks>> {
        let kinds: &[GgmlDType] = match weights {
            WeightFormat::Float(_) => return Ok(None),
            WeightFormat::Stored => return self.checkpoint.blocks(name, [out, input]),
            WeightFormat::Quantized(_) if out == self.config.vocab_size => &[GgmlDType::Q8_0],
            WeightFormat::Quantized(GgmlDType::Q4K) => &[GgmlDType::Q4K, GgmlDType::Q4_1],
            WeightFormat::Quantized(kind) => &[kind],
        };
        let floats = self.checkpoint.get(name, &[out, input], DType::F32, &Device::Cpu)?;
        for kind in kinds {
            if let Some(blocks) = Blocks::quantize(&floats, *kind)? {
                return Ok(Some(blocks));
            }
        }
        Ok(None)
    }

    /// A norm's weight, named from [`Reader::prefix`]; Gemma stores `w` and multiplies by `1 + w`.
    pub(crate) fn norm(&self, name: &str, size: usize) -> Result<Tensor> {
        let name = format!("{}{name}.weight", self.prefix);
        let weight = self.checkpoint.get(&name, &[size], DType::F32, &self.options.device)?;
        // In f32 on every device: Gemma's `1 + w` in bf16 would lose most of `w`.
        if self.config.gemma_norms { Ok((weight + 1.0)?) } else { Ok(weight) }
    }
}

/// Weights of one layer.
pub(crate) struct Layer {
    index: usize,
    /// By site.
    linears: Vec<FrozenLinear>,
    /// Over each head: (D).
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    /// (C), before and (Gemma) after each block.
    before_attention: Tensor,
    after_attention: Option<Tensor>,
    before_mlp: Tensor,
    after_mlp: Option<Tensor>,
}

impl Layer {
    pub(crate) fn load(reader: &Reader<'_>, index: usize) -> Result<Self> {
        let config = reader.config;
        let linears = (0..SITES.len())
            .map(|site| {
                let (input, out) = site_shape(config, site);
                let bias = if site < O { config.qkv_bias } else { site == O && config.o_bias };
                reader.linear(&format!("{}layers.{index}.{}", reader.prefix, site_path(site)), out, input, bias)
            })
            .collect::<Result<Vec<_>>>()?;
        let norm = |name: &str, size| reader.norm(&format!("layers.{index}.{name}"), size);
        let hidden = config.hidden_size;
        let head = |name: &str| config.qk_norm.then(|| norm(name, config.head_dim)).transpose();
        let after = |name: &str| config.gemma_norms.then(|| norm(name, hidden)).transpose();
        let before_mlp = if config.gemma_norms { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
        Ok(Layer {
            index,
            linears,
            q_norm: head("self_attn.q_norm")?,
            k_norm: head("self_attn.k_norm")?,
            before_attention: norm("input_layernorm", hidden)?,
            after_attention: after("post_attention_layernorm")?,
            before_mlp: norm(before_mlp, hidden)?,
            after_mlp: after("post_feedforward_layernorm")?,
        })
    }

    /// The linear at a site, by its index into [`SITES`].
    pub(crate) fn linear_at(&self, site: usize) -> &FrozenLinear {
        &self.linears[site]
    }

    pub(crate) fn bytes(&self) -> usize {
        let norms = [&self.q_norm, &self.k_norm, &self.after_attention, &self.after_mlp].into_iter().flatten();
        let norms = norms.chain([&self.before_attention, &self.before_mlp]);
        self.linears.iter().map(FrozenLinear::bytes).sum::<usize>() + norms.map(tensor_bytes).sum::<usize>()
    }

    /// One residual block: attention (0) or MLP (1). x: (N, C) → (N, C).
    pub(crate) fn block(
        &self,
        block: usize,
        config: &ModelConfig,
        x: &Tensor,
        rotary: &Rotary,
        attend: Attend<'_>,
        lora: LoraRows<'_>,
    ) -> Result<Tensor> {
        let eps = config.rms_norm_eps;
        let (y, after) = if block == 0 {
            let normed = rms_norm(x, &self.before_attention, eps)?;
            (self.attention(config, &normed, rotary, attend, lora)?, &self.after_attention)
        } else {
            let normed = rms_norm(x, &self.before_mlp, eps)?;
            let [gate, up] = self.linears([GATE, UP], &normed, lora)?;
            (self.last(DOWN, &gated(&gate, &up, config.activation)?, lora)?, &self.after_mlp)
        };
        match after {
            Some(weight) => add(x, &rms_norm(&y, weight, eps)?),
            None => add(x, &y),
        }
    }

    fn linears<const L: usize>(&self, sites: [usize; L], x: &Tensor, lora: LoraRows<'_>) -> Result<[Tensor; L]> {
        lora.linears(self.index, sites.map(|site| (site, &self.linears[site])), x)
    }

    /// The last linear of a block, at `site`.
    fn last(&self, site: usize, x: &Tensor, lora: LoraRows<'_>) -> Result<Tensor> {
        let run = || self.linears([site], x, lora);
        let after = if site == O { &self.after_attention } else { &self.after_mlp };
        let [y] = if after.is_some() { run()? } else { only_added(run)? };
        Ok(y)
    }

    /// x: (N, C), normed → (N, C).
    fn attention(
        &self,
        config: &ModelConfig,
        x: &Tensor,
        rotary: &Rotary,
        attend: Attend<'_>,
        lora: LoraRows<'_>,
    ) -> Result<Tensor> {
        let rows = x.dim(0)?;
        let [q, k, v] = self.linears([Q, K, V], x, lora)?;
        let heads = |x: Tensor, heads: usize| reshape(&x, (rows, heads, config.head_dim));
        let is_sliding = config.is_sliding[self.index];
        let (cos, sin) = rotary.of_layer(is_sliding);
        let rotated = |x: Tensor, norm: &Option<Tensor>| match norm {
            Some(weight) => rope(&rms_norm(&x, weight, config.rms_norm_eps)?, cos, sin),
            None => rope(&x, cos, sin),
        };
        let q = rotated(heads(q, config.num_attention_heads)?, &self.q_norm)?; // (N, H, D)
        let k = rotated(heads(k, config.num_key_value_heads)?, &self.k_norm)?; // (N, K, D)
        let v = heads(v, config.num_key_value_heads)?; // (N, K, D)

        let (scale, window) = (config.attention_scale, config.sliding_window.filter(|_| is_sliding));
        let y = match attend {
            Attend::Causal(mask) => {
                let products = self.linears[Q].low_rank_dtype();
                causal_attention(&q, &k, &v, mask, scale, window, products)?
            }
            Attend::Paged { pool, batch } => {
                let cache = &pool.layers[self.index];
                kv_write(cache, &k.to_dtype(cache.k.dtype())?, &v.to_dtype(cache.v.dtype())?, batch)?;
                paged_attention(&q, cache, batch, scale, window)?
            }
        };
        self.last(O, &reshape(&y, (rows, config.num_attention_heads * config.head_dim))?, lora)
    }
}

pub(crate) fn tensor_bytes(tensor: &Tensor) -> usize {
    tensor.elem_count() * tensor.dtype().size_in_bytes()
}
