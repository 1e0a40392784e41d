//! The decoder: embedding, layers, final norm, head.

use candle_core::{DType, Device, Tensor};

use super::layer::{Layer, Reader, tensor_bytes};
use super::rotary::Frequencies;
use super::{KvPool, LoadOptions, LoraRows, ModelConfig, Rotary};
use crate::error::{Error, Result};
use crate::ops::{CausalMask, FrozenLinear, PagedBatch, rms_norm};
use crate::weights::Checkpoint;

/// How the tokens of a flat step see each other.
#[derive(Clone, Copy)]
pub enum Attend<'a> {
    /// Training and scoring without a cache.
    Causal(&'a CausalMask),
    /// Serving: new tokens are written to the pool, then attend over it.
    Paged {
        /// The cache.
        pool: &'a KvPool,
        /// Where this step's tokens go.
        batch: &'a PagedBatch,
    },
}

/// What a checkpoint's names begin with: plain, and the text part of a Gemma 3 that also sees, as it was and is written.
const PREFIXES: [&str; 4] = ["model.", "language_model.model.", "model.language_model.", ""];

/// A loaded model. Immutable; shared by every role and by training.
pub struct Decoder {
    config: ModelConfig,
    layers_root: &'static str,
    options: LoadOptions,
    identity: String,
    frequencies: Frequencies,
    /// (V, C).
    embedding: FrozenLinear,
    embedding_scale: Option<f64>,
    layers: Vec<Layer>,
    /// (C).
    norm: Tensor,
    head: Head,
    #[cfg(test)]
    pub(crate) fault: super::fault::Fault,
}

enum Head {
    /// The embedding table.
    Tied,
    /// (V, C).
    Language(FrozenLinear),
    /// (1, C), f32.
    Score(FrozenLinear),
}

impl Decoder {
    /// Loads every tensor of the checkpoint; names the tensor when one is missing or has the wrong shape.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self> {
        if !matches!(options.float_dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::invalid(
                "dtype",
                format!("`dtype` must be f32, f16 or bf16, not {}.", options.float_dtype().as_str()),
            ));
        }
        let config = ModelConfig::from_json(checkpoint.config())?;
        let prefix = PREFIXES.iter().find(|prefix| checkpoint.has(&format!("{prefix}embed_tokens.weight")));
        let prefix = prefix.unwrap_or(&PREFIXES[0]);
        let reader = Reader { checkpoint, config: &config, options, prefix };
        let (vocabulary, hidden) = (config.vocab_size, config.hidden_size);

        let embedding = reader.linear(&format!("{prefix}embed_tokens"), vocabulary, hidden, false)?;
        let layers =
            (0..config.num_hidden_layers).map(|index| Layer::load(&reader, index)).collect::<Result<Vec<_>>>()?;
        let norm = reader.norm("norm", hidden)?;
        let head = match config.num_labels {
            0 if config.tie_word_embeddings => Head::Tied,
            0 => {
                let root = prefix.strip_suffix("model.").unwrap_or("");
                Head::Language(reader.linear(&format!("{root}lm_head"), vocabulary, hidden, false)?)
            }
            1 => {
                let weight = checkpoint.get("score.weight", &[1, hidden], DType::F32, &options.device)?;
                Head::Score(FrozenLinear::new(&weight, None)?)
            }
            labels => {
                return Err(Error::unprocessable(
                    "num_labels",
                    format!("A reward model must have one label; `num_labels` of this one is {labels}."),
                ));
            }
        };
        Ok(Decoder {
            frequencies: Frequencies::new(&config),
            embedding_scale: config.gemma_norms.then(|| (hidden as f64).sqrt()),
            options: options.clone(),
            identity: {
                let device = if options.device.is_cpu() { "cpu" } else { "gpu" };
                format!("{} {} {device}", checkpoint.fingerprint()?, options.weights)
            },
            config,
            layers_root: if prefix.contains("language_model") { "model.language_model." } else { "model." },
            embedding,
            layers,
            norm,
            head,
            #[cfg(test)]
            fault: Default::default(),
        })
    }

    /// Its shape and flags.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// What its numbers depend on: the checkpoint as [`Checkpoint::fingerprint`] tells it from others, the weights' format, the device.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Where Hugging Face's model of this checkpoint has its layers, as PEFT names them: one that also sees has them a name deeper.
    pub(crate) fn layers_root(&self) -> &'static str {
        self.layers_root
    }

    /// Device of the weights.
    pub fn device(&self) -> &Device {
        &self.options.device
    }

    /// Dtype of activations.
    pub fn compute_dtype(&self) -> DType {
        self.options.compute_dtype()
    }

    pub(crate) fn linear(&self, layer: usize, site: usize) -> &FrozenLinear {
        self.layers[layer].linear_at(site)
    }

    /// Bytes of weights held.
    pub fn bytes(&self) -> usize {
        let head = match &self.head {
            Head::Tied => 0,
            Head::Language(head) | Head::Score(head) => head.bytes(),
        };
        let layers: usize = self.layers.iter().map(Layer::bytes).sum();
        self.embedding.bytes() + layers + tensor_bytes(&self.norm) + head
    }

    /// Token embeddings, scaled where the architecture scales them. N ids → (N, C).
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            return Err(Error::invalid(
                "ids",
                format!("Token id {id} is outside the model's vocabulary of {}.", self.config.vocab_size),
            ));
        }
        let rows = self.embedding.rows(ids)?;
        match self.embedding_scale {
            Some(scale) => Ok((rows * scale)?),
            None => Ok(rows),
        }
    }

    /// Rotary tables for the positions of a step, computed once a step and passed to every layer.
    pub fn rotary(&self, positions: &[u32]) -> Result<Rotary> {
        self.frequencies.tables(positions, self.device())
    }

    /// Residual blocks: two a layer, attention and MLP.
    pub fn num_blocks(&self) -> usize {
        2 * self.layers.len()
    }

    /// One residual block: the attention of layer `index / 2` where `index` is even, its MLP where it is odd. x: (N, C) → (N, C).
    pub fn block(
        &self,
        index: usize,
        x: &Tensor,
        rotary: &Rotary,
        attend: Attend<'_>,
        lora: LoraRows<'_>,
    ) -> Result<Tensor> {
        #[cfg(test)]
        self.fault.meet()?;
        self.layers[index / 2].block(index % 2, &self.config, x, rotary, attend, lora)
    }

    /// Final norm. x: (N, C) → (N, C).
    pub fn final_norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(x, &self.norm, self.config.rms_norm_eps)
    }

    /// The whole body: embed, every block, final norm.
    pub fn forward(&self, ids: &[u32], positions: &[u32], attend: Attend<'_>, lora: LoraRows<'_>) -> Result<Tensor> {
        let rotary = self.rotary(positions)?;
        let mut x = self.embed(ids)?;
        for index in 0..self.num_blocks() {
            x = self.block(index, &x, &rotary, attend, lora)?;
        }
        self.final_norm(&x)
    }

    /// The language-model head `(V, C)`, for [`crate::ops::token_logprobs`].
    pub fn head(&self) -> Result<&FrozenLinear> {
        match &self.head {
            Head::Tied => Ok(&self.embedding),
            Head::Language(head) => Ok(head),
            Head::Score(_) => Err(Error::unprocessable(
                "model",
                "This model is a sequence classifier: it gives scores and cannot generate text.",
            )),
        }
    }

    /// Logits in f32. hidden: (M, C) after the final norm → (M, V).
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head()?.forward(hidden)?.to_dtype(DType::F32)?)
    }

    /// Raw score of a sequence-classification head with one label, in f32. hidden: (M, C) after the final norm → M scores.
    pub fn scores(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        match &self.head {
            Head::Score(head) => Ok(head.forward(&hidden.to_dtype(DType::F32)?)?.flatten_all()?.to_vec1()?),
            _ => Err(Error::unprocessable(
                "model",
                "This model has no score head: it is a language model, not a sequence classifier.",
            )),
        }
    }
}
